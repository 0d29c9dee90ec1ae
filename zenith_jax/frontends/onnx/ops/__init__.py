"""ONNX operators, a file for each family. Importing this package registers all of them."""
