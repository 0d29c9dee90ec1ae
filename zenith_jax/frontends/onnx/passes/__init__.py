"""Graph -> Graph, before anything is traced: what an ONNX file says in many nodes, in fewer and better ones."""
