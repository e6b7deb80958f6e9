"""load_weights and save_weights choose the format."""

from __future__ import annotations

import os
import pickle
import shutil

import numpy as np
import pytest

from yolotrt.errors import CheckpointError, InputError, OutputError, WeightsError
from yolotrt.weights import Metadata, Weights, load_weights, save_weights

METADATA = Metadata(yaml={"nc": 1}, names=("cat",), strides=(8,), anchors=(((10.0, 13.0),),))
WEIGHTS = Weights({"model.0.conv.weight": np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)}, METADATA)
ENGINE = b"\x10\x01\x00\x00" + b'{"stride": 32}'


@pytest.mark.parametrize("suffix", [".wts", ".safetensors", ".WTS"])
@pytest.mark.parametrize("as_text", [False, True])
def test_what_is_saved_is_loaded(suffix, as_text, tmp_path):
    path = tmp_path / f"model{suffix}"
    save_weights(WEIGHTS, str(path) if as_text else path)
    loaded = load_weights(str(path) if as_text else path)
    assert loaded.metadata.to_json() == METADATA.to_json()
    assert np.array_equal(loaded.tensors["model.0.conv.weight"], WEIGHTS.tensors["model.0.conv.weight"])


@pytest.mark.parametrize(
    ("suffix", "wrong_suffix"), [(".wts", ".pt"), (".wts", ""), (".safetensors", ".wts"), (".safetensors", ".engine")]
)
def test_the_content_counts_more_than_the_suffix(suffix, wrong_suffix, tmp_path):
    save_weights(WEIGHTS, tmp_path / f"model{suffix}")
    (tmp_path / f"model{suffix}").rename(tmp_path / f"renamed{wrong_suffix}")
    assert load_weights(tmp_path / f"renamed{wrong_suffix}").metadata.names == ("cat",)


@pytest.mark.parametrize("tag", ["pv_nc5_v70", "derived_v20_leaky_nc2_legacy"])
@pytest.mark.parametrize("suffix", [".pt", ".wts", ""])
def test_a_checkpoint_is_recognised_in_both_container_formats_under_any_suffix(tag, suffix, golden, tmp_path):
    shutil.copy(golden / "weights" / f"{tag}.pt", tmp_path / f"model{suffix}")
    assert "model.0.conv.conv.weight" in load_weights(tmp_path / f"model{suffix}").tensors or tag == "pv_nc5_v70"


@pytest.mark.parametrize("tag", ["yolov5n", "derived_seg_nc80", "derived_v31_csp_hswish_nc3"])
@pytest.mark.parametrize("suffix", [".wts", ".safetensors"])
def test_a_checkpoint_survives_conversion_to_the_bit(tag, suffix, golden, tmp_path):
    checkpoint = load_weights(golden / "weights" / f"{tag}.pt")
    save_weights(checkpoint, tmp_path / f"model{suffix}")
    converted = load_weights(tmp_path / f"model{suffix}")
    assert converted.metadata.to_json() == checkpoint.metadata.to_json()
    for name, array in converted.tensors.items():
        assert array.shape == checkpoint.tensors[name].shape
        assert array.tobytes() == checkpoint.tensors[name].tobytes()
    # A .wts has anchors as metadata, and in pixels for tensorrtx.
    missing = checkpoint.tensors.keys() - converted.tensors.keys()
    assert missing <= {"model.24.anchors", "model.24.anchor_grid"}
    assert suffix == ".wts" or not missing


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.engine", ENGINE, r"seems to be an engine \(run it with -d\): pass a .pt checkpoint"),
        ("model.pt", ENGINE, "seems to be an engine"),
        ("model.plan", b"ftrt\x00\x00\x00\x01", "seems to be an engine"),
        ("model.engine", b"\x01\x02\x03\x04\x05\x06", "seems to be an engine"),
        ("model.onnx", b"\x08\x08\x12\x07pytorch", "seems to be an ONNX model"),
        ("model.bin", b"\x08\x0a\x3a\x84\x01", "seems to be an ONNX model"),
        ("model.onnx", b"\x01\x02\x03", "seems to be an ONNX model"),
        ("bus.jpg", b"\xff\xd8\xff\xe0\x00\x10JFIF", "seems to be a picture"),
        ("model.pt", b"\x89PNG\r\n\x1a\n", "seems to be a picture"),
        ("bus", b"RIFF\x10\x00\x00\x00WEBPVP8 ", "seems to be a picture"),
        ("readme.md", "Für alle\n".encode(), "seems to be a text file"),
        ("cut.txt", ("x" * 511 + "ü").encode(), "seems to be a text file"),
        ("model.pt", b"<!DOCTYPE html>\n<html>", "seems to be a web page, so the download failed"),
        ("model.pt", b"version https://git-lfs.github.com/spec/v1\n", r"run git lfs pull"),
        ("data.bin", b"\x00\x01\xfe\xff" * 200, "seems to be a file of an unknown format"),
        ("data.bin", b"\xff\xfe", "seems to be a file of an unknown format"),
        ("empty.wts", b"", "is empty"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_what_it_seems_to_be(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        load_weights(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.exit_status == 2


def test_real_files_of_other_kinds_are_recognised(golden):
    with pytest.raises(WeightsError, match="a picture"):
        load_weights(golden / "images" / "bus.jpg")
    with pytest.raises(WeightsError, match="a text file"):
        load_weights(golden / "README.md")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("model.wts", WeightsError, "line 1 is b'hello' instead of the count of entries"),
        ("model.safetensors", WeightsError, "is no intact .safetensors file"),
        ("model.pt", CheckpointError, "model.pt is text, not a checkpoint"),
        ("model.pth", CheckpointError, "model.pth is text, not a checkpoint"),
    ],
)
def test_unknown_content_goes_to_the_reader_that_the_suffix_names(name, error, message, tmp_path):
    (tmp_path / name).write_bytes(b"hello\n")
    with pytest.raises(error, match=message):
        load_weights(tmp_path / name)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    (tmp_path / "model.wts").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError):
        load_weights(tmp_path / "model.wts")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(("name", "message"), [("", "is a directory"), ("nowhere.pt", "does not exist")])
def test_a_path_that_is_no_file_is_refused(name, message, tmp_path):
    with pytest.raises(WeightsError, match=message):
        load_weights(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(WeightsError, match="is not a regular file"):
        load_weights(tmp_path / "pipe.pt")


@pytest.mark.parametrize("name", ["model.pt", "model.engine", "model", "model.wts.gz"])
def test_other_suffixes_are_not_written(name, tmp_path):
    with pytest.raises(WeightsError, match=r"its suffix is unknown: use .wts or .safetensors"):
        save_weights(WEIGHTS, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_half_precision_is_for_safetensors_only(tmp_path):
    with pytest.raises(WeightsError, match=r"a .wts holds float32 only: use .safetensors"):
        save_weights(WEIGHTS, tmp_path / "model.wts", half=True)
    save_weights(WEIGHTS, tmp_path / "full.safetensors")
    save_weights(WEIGHTS, tmp_path / "half.safetensors", half=True)
    assert not (tmp_path / "model.wts").exists()
    assert (tmp_path / "half.safetensors").stat().st_size < (tmp_path / "full.safetensors").stat().st_size


@pytest.mark.parametrize("suffix", [".wts", ".safetensors"])
def test_a_place_that_cannot_be_written_is_an_output_error(suffix, tmp_path):
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(OutputError, match="it is a directory"):
        save_weights(WEIGHTS, tmp_path / f"folder{suffix}")
    assert not issubclass(OutputError, InputError)
