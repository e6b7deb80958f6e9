"""A real server, asked over HTTP and gRPC."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("tritonclient", reason="tritonclient is not installed")

import tritonclient.grpc
import tritonclient.http

from yolotrt import Detector
from yolotrt.media.images import decode_image
from yolotrt.postprocess import NmsOptions
from yolotrt.triton.models import NO_PICTURE
from yolotrt.triton.repository import ServingOptions, export_repository

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    random = np.random.RandomState(3)
    arrays = [random.randint(0, 256, (40 + 9 * n, 90 - 7 * n, 3), np.uint8) for n in range(8)]
    return [cv2.imencode(".jpg", array)[1].tobytes() for array in arrays]


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory, tiny_dynamic_engine):
    folder = tmp_path_factory.mktemp("models")
    options = ServingOptions("tiny", NmsOptions(max_detections=50), python_engine=True)
    export_repository(tiny_dynamic_engine, folder, options)
    return start_server(folder)


def ask(library, client, *files: bytes):
    """COUNT and, for each picture, boxes, scores and classes."""
    image = library.InferInput("IMAGE", [len(files), 1], "BYTES")
    image.set_data_from_numpy(np.array([[data] for data in files], dtype=object))
    answer = client.infer("tiny", [image])
    counts = answer.as_numpy("COUNT").ravel().tolist()
    values = [answer.as_numpy(name) for name in ("BOXES", "SCORES", "CLASSES")]
    return counts, [[array[n, : max(count, 0)] for array in values] for n, count in enumerate(counts)]


def assert_equal(found, data: bytes, detector: Detector) -> None:
    expected = detector(decode_image(data, "picture"))
    assert len(expected) == len(found[0])
    np.testing.assert_allclose(found[0], expected.xyxy, atol=TOLERANCE)
    np.testing.assert_allclose(found[1], expected.confidence, atol=TOLERANCE)
    np.testing.assert_array_equal(found[2], expected.class_id)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_answers_are_those_of_the_detector(server, pictures, tiny_dynamic_engine, protocol):
    library = getattr(tritonclient, protocol)
    with Detector(tiny_dynamic_engine, max_detections=50) as detector:
        assert sum(len(detector(decode_image(data, "x"))) for data in pictures) > 50
        with library.InferenceServerClient(getattr(server, protocol)) as client:
            for data in pictures:
                _, found = ask(library, client, data)
                assert_equal(found[0], data, detector)
            counts, found = ask(library, client, pictures[0], b"no picture", pictures[1])
            assert counts[1] == NO_PICTURE
            assert_equal(found[0], pictures[0], detector)
            assert_equal(found[2], pictures[1], detector)


def test_requests_of_many_clients_share_batches(server, pictures, tiny_dynamic_engine):
    def work() -> list:
        with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
            return [ask(tritonclient.grpc, client, data)[1][0] for data in pictures * 3]

    before = [server.metric(f"nv_inference_{name}", "tiny_engine") for name in ("count", "exec_count")]
    with ThreadPoolExecutor(8) as pool:
        answers = [future.result() for future in [pool.submit(work) for _ in range(8)]]
    after = [server.metric(f"nv_inference_{name}", "tiny_engine") for name in ("count", "exec_count")]
    pictures_done, batches = (new - old for new, old in zip(after, before, strict=True))
    assert pictures_done == 8 * 3 * len(pictures)
    assert batches < 0.8 * pictures_done
    with Detector(tiny_dynamic_engine, max_detections=50) as detector:
        for found, data in zip(answers[0], pictures * 3, strict=True):
            assert_equal(found, data, detector)
        for others in answers[1:]:
            for found, first in zip(others, answers[0], strict=True):
                for mine, theirs in zip(found, first, strict=True):
                    np.testing.assert_allclose(mine, theirs, atol=TOLERANCE)


def test_the_readme_asks_as_these_tests_do(tmp_path: Path, tiny_dynamic_engine):
    export_repository(tiny_dynamic_engine, tmp_path, ServingOptions("tiny"))
    text = (tmp_path / "README.md").read_text()
    assert 'InferInput("IMAGE", [1, 1], "BYTES")' in text
    assert 'client.infer("tiny", [image])' in text
