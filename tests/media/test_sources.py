from __future__ import annotations

from pathlib import Path

import pytest

from yolotrt.errors import InputError
from yolotrt.media.sources import MEDIA_SUFFIXES, expand_sources, is_video, public_name, source_name


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is both the current and the home one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


def touch(*names: str) -> None:
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def names(sources: list[Path | str]) -> list[str]:
    return [source if isinstance(source, str) else source.as_posix() for source in sources]


FILES = (
    "a/10.jpg", "a/2.jpg", "a/1.PNG", "a/.hidden.jpg", "a/notes.md", "a/clip.mp4", "a/deep/3.jpg", "a/deep/er/4.jpg",
    "a/folder.jpg/5.txt", "odd[1].jpg", "odd1.jpg", "x*y.jpg", "xzy.jpg", "data.raw", "b/2.jpg",
)  # fmt: skip


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["a/2.jpg"], ["a/2.jpg"]),
        ([Path("a/2.jpg")], ["a/2.jpg"]),
        # A bare string is one source, not its characters.
        ("a/2.jpg", ["a/2.jpg"]),
        (["data.raw"], ["data.raw"]),
        (["a"], ["a/1.PNG", "a/2.jpg", "a/10.jpg", "a/clip.mp4"]),
        (["a/"], ["a/1.PNG", "a/2.jpg", "a/10.jpg", "a/clip.mp4"]),
        (["a/*.jpg"], ["a/2.jpg", "a/10.jpg"]),
        (["a/*"], ["a/1.PNG", "a/2.jpg", "a/10.jpg", "a/clip.mp4"]),
        (["a/?.jpg"], ["a/2.jpg"]),
        (["a/[0-9].*"], ["a/1.PNG", "a/2.jpg"]),
        (["a/**/*.jpg"], ["a/2.jpg", "a/10.jpg", "a/deep/3.jpg", "a/deep/er/4.jpg"]),
        (["a/**"], ["a/1.PNG", "a/2.jpg", "a/10.jpg", "a/clip.mp4", "a/deep/3.jpg", "a/deep/er/4.jpg"]),
        # A file of that very name goes before the pattern, which would match odd1.jpg and both x?y.jpg.
        (["odd[1].jpg"], ["odd[1].jpg"]),
        (["x*y.jpg"], ["x*y.jpg"]),
        (["odd[1].j*g"], ["odd1.jpg"]),
        (["b", "a/2.jpg", "b/2.jpg"], ["b/2.jpg", "a/2.jpg"]),
        (["a/10.jpg", "a", "a/../a/2.jpg"], ["a/10.jpg", "a/1.PNG", "a/2.jpg", "a/clip.mp4"]),
        (["./a/2.jpg", "a/2.jpg"], ["a/2.jpg"]),
        # Cameras and streams stay text; a video file on the web is a file.
        (["0", "/dev/video3", "rtsp://u:p@host:554/live?a=1"], ["0", "/dev/video3", "rtsp://u:p@host:554/live?a=1"]),
        (["http://host/live.m3u8", "https://host/live.ts"], ["http://host/live.m3u8", "https://host/live.ts"]),
        (["https://host/a/clip.mp4?key=1"], ["https:/host/a/clip.mp4?key=1"]),
        ([Path("rtsp://host/live")], ["rtsp://host/live"]),
        (["a/*.mp4", "0", "0"], ["a/clip.mp4", "0"]),
    ],
)
def test_sources_become_files(home: Path, sources: list[str | Path], expected: list[str]) -> None:
    touch(*FILES)
    assert names(expand_sources(sources)) == expected


def test_home_is_expanded(home: Path) -> None:
    touch("a/2.jpg", "a/1.jpg", "list.txt")
    Path("list.txt").write_text("~/a/1.jpg\n")
    for source in ("~/a/1.jpg", "~/a/1*", "~/list.txt"):
        assert expand_sources([source]) == [home / "a" / "1.jpg"]
    assert expand_sources(["~/a"]) == [home / "a" / "1.jpg", home / "a" / "2.jpg"]


def test_a_file_that_begins_with_a_tilde_is_found(home: Path) -> None:
    touch("~picture.jpg")
    assert names(expand_sources(["~picture.jpg"])) == ["~picture.jpg"]


def test_natural_order_compares_numbers_by_value(home: Path) -> None:
    ordered = ["a.jpg", "B.jpg", "frame 01.jpg", "frame 1.jpg", "frame 2.jpg", "frame 10 a9.jpg", "frame 10 a10.jpg"]
    touch(*(f"f/{name}" for name in reversed(ordered)), "f/7.jpg")
    assert [Path(path).name for path in expand_sources(["f"])] == ["7.jpg", *ordered]


@pytest.mark.parametrize("suffix", MEDIA_SUFFIXES)
def test_every_suffix_is_found_in_a_folder_in_any_case(home: Path, suffix: str) -> None:
    touch(f"f/small{suffix}", f"f/UPPER{suffix.upper()}")
    assert [Path(path).stem for path in expand_sources(["f"])] == ["small", "UPPER"]


def test_links_to_one_picture_count_apart_but_linked_folders_do_not(home: Path) -> None:
    touch("f/a.jpg")
    Path("f/b.jpg").symlink_to(home / "f" / "a.jpg")
    Path("g").symlink_to(home / "f")
    assert names(expand_sources(["f", "g"])) == ["f/a.jpg", "f/b.jpg"]


def test_links_that_lead_nowhere_are_left_for_the_reader_to_name(home: Path) -> None:
    touch("f/a.jpg")
    Path("f/b.jpg").symlink_to(home / "gone" / "b.jpg")
    Path("f/c.jpg").symlink_to(home / "f" / "c.jpg")  # to itself
    for source in ("f", "f/*.jpg"):
        assert names(expand_sources([source])) == ["f/a.jpg", "f/b.jpg", "f/c.jpg"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_list_names_files_beside_it_or_in_the_current_folder(home: Path, newline: str, encoding: str) -> None:
    touch("data/pictures/1.jpg", "elsewhere/2.jpg", "data/both.jpg", "both.jpg", "data/Größe.jpg")
    lines = [
        "# a comment",
        "",
        "./pictures/1.jpg",
        "  elsewhere/2.jpg  ",
        "both.jpg",
        "Größe.jpg",
        "pictures/1.jpg",
        "",
    ]
    Path("data/list.txt").write_bytes(newline.join(lines).encode(encoding))
    expected = ["data/pictures/1.jpg", "elsewhere/2.jpg", "data/both.jpg", "data/Größe.jpg"]
    assert names(expand_sources(["data/list.txt"])) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"list list\.txt names no source: write one a line"),
        (b"# nothing\n\n", r"list list\.txt names no source"),
        (
            b"1.jpg\n\nnone.jpg\n# c\nno.png",
            r"do not exist, line 3 \(none\.jpg\), line 5 \(no\.png\): correct the list",
        ),
        (b"\n".join(b"n%d.jpg" % i for i in range(9)), r"line 5 \(n4\.jpg\) and 4 more: correct"),
        (b"1.jpg\nfolder\n", r"line 2 \(folder\)"),
        (b"1.jpg\ngone.mp4\n", r"line 2 \(gone\.mp4\)"),
        (b"1.jpg\nhttp://host/a.jpg\n", r"line 2: source http://host/a\.jpg is a picture on the web: download it"),
        (b"1.jpg\n\xff\xfe\n", r"list list\.txt is not UTF-8 text: save it as UTF-8"),
        (b"a\0b.jpg\n", r"list\.txt"),
    ],
)
def test_a_wrong_list_is_refused(home: Path, content: bytes, message: str) -> None:
    touch("1.jpg", "clip.mp4", "folder/1.jpg")
    Path("list.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        expand_sources(["list.txt"])


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "no source given: name"),
        ([""], "a source is empty: name"),
        (["a/2.jpg", "none.jpg"], r"source none\.jpg does not exist: check the path"),
        (["a/2.jpg/below"], r"source a/2\.jpg/below does not exist|cannot be opened"),
        (["empty"], r"folder empty holds no picture or video: name one with files of .*\.jpg"),
        (["a/*.gif"], r"no picture or video matches a/\*\.gif: check the pattern; suffixes are .*\.jpg"),
        (["none/**/*.jpg"], r"no picture or video matches none/\*\*/\*\.jpg"),
        ([Path("https://host/a.jpg")], r"source https://host/a\.jpg is a picture on the web: download it first"),
        (["a/*.webm"], r"no picture or video matches a/\*\.webm: check the pattern"),
        (["gone.AVI"], r"source gone\.AVI does not exist: check the path"),
        (["a\0b"], r"cannot be opened .*: check the path|does not exist: check the path"),
        (["x" * 5000 + ".jpg"], r"cannot be opened .*: check the path"),
        (["~nobody-of-that-name/a.jpg"], r"cannot be opened .*: check the path"),
    ],
)
def test_a_wrong_source_is_refused_in_one_line(home: Path, sources: list[str | Path], message: str) -> None:
    touch(*FILES, "empty/notes.md", "empty/.hidden.jpg", "empty/deep/1.jpg")
    with pytest.raises(InputError, match=message) as caught:
        expand_sources(sources)
    assert "\n" not in str(caught.value)


def test_a_folder_may_be_named_like_a_video_or_a_camera(home: Path) -> None:
    touch("frames.mp4/1.jpg", "0/2.jpg")
    assert names(expand_sources(["frames.mp4", "./0"])) == ["frames.mp4/1.jpg", "0/2.jpg"]


def test_a_list_may_name_cameras_streams_and_videos(home: Path) -> None:
    touch("clip.mp4")
    Path("list.txt").write_text("0\nrtsp://host/live\nclip.mp4\n/dev/video1\n")
    assert names(expand_sources(["list.txt"])) == ["0", "rtsp://host/live", "clip.mp4", "/dev/video1"]


@pytest.mark.parametrize(
    ("source", "expected"), [("a.mp4", True), ("A.MKV", True), ("a.jpg", False), ("https://host/a.mp4?b", True)]
)
def test_a_video_is_known_by_its_name(source: str, expected: bool) -> None:
    assert is_video(Path(source)) is expected
    assert source_name(Path(source)) == source


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("rtsp://user:secret@host/live", "rtsp://host/live"),
        ("https://user:secret@host:8000/clip.mp4", "https://host:8000/clip.mp4"),
        ("folder/a@b.mp4", "folder/a@b.mp4"),
        ("0", "0"),
    ],
)
def test_a_password_is_not_shown(source: str, expected: str) -> None:
    assert public_name(source) == expected


def test_the_error_about_a_picture_on_the_web_has_no_password() -> None:
    with pytest.raises(InputError, match=r"^source https://host/a\.jpg is a picture on the web: download it first$"):
        expand_sources(["https://user:secret@host/a.jpg"])
