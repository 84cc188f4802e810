"""Tests of workspace/prepare.py: sources, splits, tokens, downloads."""

import gc
import hashlib
import importlib.util
import json
import lzma
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st
from pytest_httpserver import HTTPServer
from werkzeug import Response


def load_prepare() -> ModuleType:
    path = Path(__file__).parents[2] / "workspace" / "prepare.py"
    spec = importlib.util.spec_from_file_location("nightlab_prepare", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
prepare: Any = load_prepare()
VERSE = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n"


def folder_of(tmp_path: Path, texts: dict[str, bytes]) -> Path:
    folder = tmp_path / "texts"
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return folder


def forty_texts() -> dict[str, bytes]:
    return {f"{n:02}.txt": f"{n} {VERSE * (1 + n % 3)}".encode() for n in range(40)}


def made(tmp_path: Path, folder: Path, name: str = "out", **changes: Any) -> Path:
    settings = {"vocab_size": 300, "context": 16, "rows": 1000} | changes
    output = tmp_path / name
    assert prepare.prepare(
        prepare.Settings(f"folder:{folder}", **settings), output, tmp_path / "cache"
    )
    return output


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def tokens_of(folder: Path) -> list[int]:
    raw = (folder / "tokens.bin").read_bytes()
    return list(struct.unpack(f"<{len(raw) // 2}H", raw))


@pytest.mark.slow
def test_shakespeare_becomes_the_three_known_streams(tmp_path: Path) -> None:
    settings = prepare.Settings("shakespeare", 1024, 256, 1024)
    assert prepare.prepare(settings, tmp_path / "out", tmp_path / "cache")
    manifest = read(tmp_path / "out" / "manifest.json")
    sizes = {split: summary["bytes"] for split, summary in manifest["splits"].items()}
    assert {"train": 4_062_076, "val": 501_212, "holdout": 488_940} == sizes
    hashes = {split: summary["sha256"] for split, summary in manifest["splits"].items()}
    assert hashes == prepare.SHAKESPEARE_SPLIT_SHA256
    meta = read(tmp_path / "out" / "val" / "meta.json")
    tokens = tokens_of(tmp_path / "out" / "val")
    assert sum(meta["token_bytes"][token] for token in tokens) == 501_212
    assert [meta["bos_token"]] * 4 == [tokens[start] for start in meta["documents"]]
    assert not prepare.prepare(settings, tmp_path / "out", tmp_path / "cache")


def test_equal_sources_give_identical_files(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, forty_texts())
    first, second = made(tmp_path, folder, "first"), made(tmp_path, folder, "second")
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert [(first / name).read_bytes() for name in names] == [
        (second / name).read_bytes() for name in names
    ]
    assert len(names) == 8


def test_tokens_spell_the_documents_with_one_bos_before_each(tmp_path: Path) -> None:
    texts = forty_texts() | {"odd.txt": "naïve 🙂 <|endoftext|>\r\n\x00".encode() + b"\xff\xfe\xc3"}
    output = made(tmp_path, folder_of(tmp_path, texts))
    spelled = {}
    for split in ("train", "val", "holdout"):
        meta = read(output / split / "meta.json")
        tokens = tokens_of(output / split)
        ends = [*meta["documents"][1:], len(tokens)]
        names = read(output / "manifest.json")["splits"][split]["names"]
        for name, start, end in zip(names, meta["documents"], ends, strict=True):
            assert tokens[start] == meta["bos_token"]
            spelled[name] = tokens[start + 1 : end]
    vocabulary = read(output / "tokenizer.json")["model"]["vocab"]
    letters = prepare.byte_of_letter()
    table = {token: bytes(letters[c] for c in name) for name, token in vocabulary.items()}
    assert texts == {name: b"".join(table[t] for t in ids) for name, ids in spelled.items()}


def test_the_byte_table_adds_up_to_the_bytes_of_the_split(tmp_path: Path) -> None:
    texts = {f"{n}.txt": f"{n} Ærøskøbing, 東京 🙂 {VERSE}".encode() for n in range(9)}
    output = made(tmp_path, folder_of(tmp_path, texts))
    for split in ("val", "holdout"):
        meta = read(output / split / "meta.json")
        counted = sum(meta["token_bytes"][token] for token in tokens_of(output / split))
        names = read(output / "manifest.json")["splits"][split]["names"]
        assert counted == meta["bytes"] == sum(len(texts[name]) for name in names)
        assert 0 == meta["token_bytes"][meta["bos_token"]]
    assert "token_bytes" not in read(output / "train" / "meta.json")


@pytest.fixture(scope="module")
def small_tokenizer() -> Any:
    return prepare.train_tokenizer([prepare.Document("verse", VERSE.encode() * 5)], 300)


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode()))
def test_any_bytes_survive_the_tokeniser(small_tokenizer: Any, text: bytes) -> None:
    spelled = prepare.bytes_of_tokens(small_tokenizer)
    token_of_byte = {word[0]: token for token, word in enumerate(spelled) if len(word) == 1}
    tokens = prepare.encode(text, small_tokenizer, token_of_byte)
    assert text == b"".join(spelled[token] for token in tokens)
    assert prepare.bos_token(small_tokenizer) not in tokens


def test_the_smallest_vocabulary_has_one_token_a_byte(tmp_path: Path) -> None:
    output = made(tmp_path, folder_of(tmp_path, forty_texts()), vocab_size=257)
    meta = read(output / "val" / "meta.json")
    assert (257, [1] * 256 + [0]) == (meta["vocab_size"], meta["token_bytes"])


def test_equal_documents_stay_in_one_split_whatever_their_order(tmp_path: Path) -> None:
    texts = forty_texts()
    twins = texts | {f"again/{name}": text for name, text in texts.items()}
    output = made(tmp_path, folder_of(tmp_path, twins))
    splits = read(output / "manifest.json")["splits"]
    where = {name: split for split, facts in splits.items() for name in facts["names"]}
    assert {name: where[name] for name in texts} == {name: where[f"again/{name}"] for name in texts}
    assert {"train": 72, "val": 4, "holdout": 4} == {
        split: facts["documents"] for split, facts in splits.items()
    }


def test_jsonl_and_parquet_rows_are_documents(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a.txt": VERSE.encode()})
    lines = [json.dumps({"text": f"line {n} {VERSE}"}) for n in range(3)]
    (folder / "b.jsonl").write_text("\n".join(lines))
    table = pa.table({"text": [f"row {n} {VERSE}" for n in range(4)], "other": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, folder / "c.parquet")
    splits = read(made(tmp_path, folder) / "manifest.json")["splits"]
    names = sorted(name for facts in splits.values() for name in facts["names"])
    rows = [f"b.jsonl:{n}" for n in (1, 2, 3)] + [f"c.parquet:{n}" for n in (1, 2, 3, 4)]
    assert ["a.txt", *rows] == names


def test_half_a_surrogate_pair_in_json_is_kept_as_bytes(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, forty_texts())
    (folder / "half.jsonl").write_text('{"text": "a\\ud800b"}\n')
    documents = list(prepare.documents_in(folder / "half.jsonl", "half.jsonl"))
    assert [b"a\xed\xa0\x80b"] == [document.text for document in documents]
    assert made(tmp_path, folder).is_dir()


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = prepare.main(arguments)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--source", "wikipedia"], "no source 'wikipedia'"),
        (["--source", "folder:/nowhere"], "/nowhere is not a folder"),
        (["--source", "url:/nowhere"], "/nowhere is not a file"),
        (["--vocab-size", "256"], "257 to 65535"),
        (["--vocab-size", "65536"], "257 to 65535"),
        (["--context", "1"], "2 to 65536"),
        (["--rows", "3"], "at least 4 rows"),
        (["--source", "generated:secret"], "no source 'generated:secret'"),
    ],
)
def test_bad_input_ends_with_code_2_and_a_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = refused([*arguments, "--output", str(tmp_path / "out")], capsys)
    assert 2 == code
    assert sentence in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ({"a.txt": b"one", "b.txt": b"two", "c.txt": b"two"}, "2 different documents"),
        ({"a.md": b"one"}, "has no .txt, .jsonl, .parquet file"),
        ({"a.jsonl": b'{"words": 1}'}, "a.jsonl, line 1"),
        ({"a.jsonl": b'{"text": 1}'}, '"text" must be a string'),
        ({"a.jsonl": b"[1"}, "a.jsonl, line 1"),
        ({"a.parquet": b"no table"}, "not a parquet file"),
        ({"a.txt": b"a", "b.txt": b"b", "c.txt": b"c"}, "not even one context"),
    ],
)
def test_unusable_folders_are_refused(
    texts: dict[str, bytes], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"folder:{folder_of(tmp_path, texts)}"
    code, said = refused(["--source", source, "--output", str(tmp_path / "out")], capsys)
    assert 2 == code
    assert sentence in said
    assert not (tmp_path / "out").exists()


def test_parquet_without_its_library_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(prepare.PrepareError, match=r"nightlab\[parquet\]"):
        list(prepare.documents_in(tmp_path / "a.parquet", "a.parquet"))


def test_a_complete_folder_is_reused_and_another_one_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path, forty_texts())
    common = ["--source", f"folder:{folder}", "--output", str(tmp_path / "out"), "--context", "16"]
    assert 0 == prepare.main([*common, "--vocab-size", "300"])
    before = (tmp_path / "out" / "manifest.json").stat()
    assert 0 == prepare.main([*common, "--vocab-size", "300"])
    assert before == (tmp_path / "out" / "manifest.json").stat()
    code, said = refused([*common, "--vocab-size", "301"], capsys)
    assert (2, True) == (code, "choose another --output" in said)
    (folder / "new.txt").write_text("more")
    assert 2 == prepare.main([*common, "--vocab-size", "300"])


def test_val_and_holdout_have_no_more_rows_than_asked_and_train_has_all(tmp_path: Path) -> None:
    texts = forty_texts() | {f"more-{n}.txt": f"{n} {VERSE * 9}".encode() for n in range(400)}
    folder = folder_of(tmp_path, texts)
    whole, capped = made(tmp_path, folder, "whole"), made(tmp_path, folder, "capped", rows=30)
    for split in ("val", "holdout"):
        all_tokens, tokens = tokens_of(whole / split), tokens_of(capped / split)
        assert 30 * 16 == len(tokens) < len(all_tokens)
        assert all_tokens[: 30 * 16] == tokens
        meta = read(capped / split / "meta.json")
        assert meta["bytes"] == sum(meta["token_bytes"][token] for token in tokens)
        summary = read(capped / "manifest.json")["splits"][split]
        assert summary["bytes"] == meta["bytes"]
        assert summary["documents"] == len(meta["documents"]) == tokens.count(meta["bos_token"])
    assert tokens_of(whole / "train") == tokens_of(capped / "train")


def test_which_rows_are_kept_follows_from_content_and_not_from_where_it_lay(tmp_path: Path) -> None:
    texts = forty_texts()
    other = {f"z{100 - n}.txt": text for n, text in enumerate(texts.values())}
    there = folder_of(tmp_path / "elsewhere", other)
    first = made(tmp_path, folder_of(tmp_path, texts), "first", rows=8)
    second = made(tmp_path, there, "second", rows=8)
    for split in ("train", "val", "holdout"):
        assert tokens_of(first / split) == tokens_of(second / split)


def test_generated_text_is_secret_until_its_seed_is_named(tmp_path: Path) -> None:
    def generated(name: str, source: str) -> dict[str, Any]:
        settings = prepare.Settings(source, 300, 64, 100)
        assert prepare.prepare(settings, tmp_path / name, tmp_path / "cache")
        manifest: dict[str, Any] = read(tmp_path / name / "manifest.json")
        return manifest

    first, second = generated("first", "generated"), generated("second", "generated")
    assert first["source"] != second["source"]
    assert first["splits"]["val"]["sha256"] != second["splits"]["val"]["sha256"]
    again = generated("again", first["source"])
    assert first["splits"] == again["splits"]
    assert not prepare.prepare(
        prepare.Settings("generated", 300, 64, 100), tmp_path / "first", tmp_path / "cache"
    )


def test_generated_text_can_be_learned_and_is_no_repetition() -> None:
    documents = list(prepare.written_documents("ab"))
    text = b"".join(document.text for document in documents)
    # By spelling alone a byte takes more than four bits, by all that xz finds less than two.
    counts = [text.count(bytes([byte])) / len(text) for byte in set(text)]
    assert 4 < -sum(share * math.log2(share) for share in counts)
    assert 1.2 < 8 * len(lzma.compress(text)) / len(text) < 1.9
    lines = text.split(b"\n")
    assert len(lines) * 0.98 < len(set(lines))


def test_no_held_out_work_is_named_where_the_researcher_reads() -> None:
    held_out = {"val": 4, "holdout": 4}
    assert held_out == {split: len(it) for split, it in prepare.SHAKESPEARE_HELD_OUT.items()}
    assert "val" == prepare.shakespeare_split("macbeth")
    text = (Path(__file__).parents[2] / "workspace" / "prepare.py").read_text().lower()
    for word in ("macbeth", "richard", "twelfth", "winter", "henry", "caesar", "ado_", "tempest"):
        assert word not in text


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    output = made(tmp_path, folder_of(tmp_path, forty_texts()))
    assert (output / "manifest.json").is_file()


def test_what_a_killed_run_left_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "out.partial" / "train").mkdir(parents=True)
    (tmp_path / "out.partial" / "junk").touch()
    output = made(tmp_path, folder_of(tmp_path, forty_texts()))
    assert not (output / "junk").exists()
    assert not (tmp_path / "out.partial").exists()


def test_every_setting_changes_the_key(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, forty_texts())
    choices = [
        ("shakespeare", 1024, 256, 1024),
        (f"folder:{folder}", 1024, 256, 1024),
        (f"folder:{folder}", 1025, 256, 1024),
        (f"folder:{folder}", 1024, 128, 1024),
        (f"folder:{folder}", 1024, 256, 1023),
        ("generated", 1024, 256, 1024),
        ("generated:ab", 1024, 256, 1024),
    ]
    keys = [prepare.key(prepare.Settings(*choice)) for choice in choices]
    assert len(choices) == len(set(keys))
    assert keys == [prepare.key(prepare.Settings(*choice)) for choice in choices]


def test_cleaning_unifies_line_ends_and_drops_blanks() -> None:
    assert b"a\n\nb\n c\n" == prepare.clean(b"\n a \r\n\n\n\n\nb\t\n c\n\n")


# Downloads, against a server on this machine

BODY = bytes(range(256)) * 4096


def broken_off(body: bytes, promised_bytes: int) -> Response:
    """An answer that ends before the bytes that it promised."""
    response = Response(body)
    response.headers["Content-Length"] = str(promised_bytes)
    return response


@pytest.fixture
def swept() -> Iterator[None]:
    """Finds what pooch leaves to the garbage collector, a refused request's socket, here."""
    yield
    gc.collect()


def answering(httpserver: HTTPServer, *answers: Response) -> str:
    """The address of a shard that is served so, answer by answer; the last one ever again."""
    *first, last = answers
    for answer in first:
        httpserver.expect_oneshot_request("/shard.txt").respond_with_response(answer)
    httpserver.expect_request("/shard.txt").respond_with_response(last)
    return httpserver.url_for("/shard.txt")


def fetched(url: str, cache: Path, sha256: str | None = None) -> bytes:
    path: Path = prepare.fetch(prepare.Address(url, sha256), cache, tenacity.wait_none())
    return path.read_bytes()


def test_a_transfer_that_breaks_off_is_made_again_and_leaves_nothing_else(
    httpserver: HTTPServer, tmp_path: Path
) -> None:
    url = answering(httpserver, broken_off(BODY[:600_000], len(BODY)), Response(BODY))
    assert BODY == fetched(url, tmp_path, hashlib.sha256(BODY).hexdigest())
    assert 2 == len(httpserver.log)
    assert [BODY] == [path.read_bytes() for path in tmp_path.iterdir()]


def test_a_transfer_that_ever_breaks_off_leaves_no_part_that_could_be_taken_for_the_file(
    httpserver: HTTPServer, tmp_path: Path
) -> None:
    url = answering(httpserver, broken_off(BODY[:600_000], len(BODY)))
    with pytest.raises(prepare.UnreachableError, match="run again to go on"):
        fetched(url, tmp_path)
    assert [] == list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_never_used(httpserver: HTTPServer, tmp_path: Path) -> None:
    (tmp_path / "tmpk1ll3d").write_bytes(BODY[:1000])
    assert BODY == fetched(answering(httpserver, Response(BODY)), tmp_path)


def test_a_file_that_changed_between_tries_is_not_mixed(
    httpserver: HTTPServer, tmp_path: Path
) -> None:
    old = broken_off(b"old" * 200_000, 1_200_000)
    assert BODY == fetched(answering(httpserver, old, Response(BODY)), tmp_path)


@pytest.mark.usefixtures("swept")
def test_two_server_errors_are_waited_out(httpserver: HTTPServer, tmp_path: Path) -> None:
    url = answering(httpserver, Response(status=500), Response(status=500), Response(BODY))
    assert BODY == fetched(url, tmp_path)
    assert 3 == len(httpserver.log)


@pytest.mark.usefixtures("swept")
def test_a_server_that_stays_broken_is_given_up(httpserver: HTTPServer, tmp_path: Path) -> None:
    url = answering(httpserver, Response(status=503))
    with pytest.raises(prepare.UnreachableError, match=r"HTTP 503.*run again to go on"):
        fetched(url, tmp_path)
    assert 6 == len(httpserver.log)


def test_a_server_that_is_not_there_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(prepare.UnreachableError, match=r"ConnectionError.*run again to go on"):
        fetched("http://127.0.0.1:9/shard.txt", tmp_path)


@pytest.mark.usefixtures("swept")
def test_a_missing_file_is_not_asked_for_twice(httpserver: HTTPServer, tmp_path: Path) -> None:
    url = answering(httpserver, Response(status=404))
    with pytest.raises(prepare.UnreachableError, match="HTTP 404"):
        fetched(url, tmp_path)
    assert 1 == len(httpserver.log)


def test_a_wrong_checksum_is_refused_and_nothing_kept(
    httpserver: HTTPServer, tmp_path: Path
) -> None:
    url = answering(httpserver, Response(BODY))
    with pytest.raises(prepare.PrepareError, match="another checksum"):
        fetched(url, tmp_path, "0" * 64)
    assert (1, []) == (len(httpserver.log), list(tmp_path.iterdir()))


def test_a_cached_file_whose_checksum_is_no_longer_the_lists_is_fetched_anew(
    httpserver: HTTPServer, tmp_path: Path
) -> None:
    url = answering(httpserver, Response(b"old"), Response(BODY))
    assert b"old" == fetched(url, tmp_path)
    assert BODY == fetched(url, tmp_path, hashlib.sha256(BODY).hexdigest())


def test_a_url_list_is_prepared_and_fetched_only_once(
    httpserver: HTTPServer, tmp_path: Path
) -> None:
    lines = "\n".join(json.dumps({"text": f"{n} {VERSE}"}) for n in range(40)).encode()
    httpserver.expect_request("/data/shard.jsonl").respond_with_data(lines)
    shard = httpserver.url_for("/data/shard.jsonl?download=true")
    listed = tmp_path / "shards.list"
    listed.write_text(f"# two shards\n\n{shard} {hashlib.sha256(lines).hexdigest()}\n")
    common = ["--source", f"url:{listed}", "--vocab-size", "300", "--context", "16"]
    assert 0 == prepare.main([*common, "--output", str(tmp_path / "one")])
    assert 0 == prepare.main([*common, "--output", str(tmp_path / "two")])
    assert 1 == len(httpserver.log)
    splits = read(tmp_path / "two" / "manifest.json")["splits"]
    assert 40 == sum(split["documents"] for split in splits.values())


@pytest.mark.parametrize(
    "line",
    [
        "file:///etc/passwd.txt",
        "ftp://example.org/a.parquet",
        "http:///a.parquet",
        "https://example.org/a.exe",
        "https://example.org/a.parquet abc",
        f"https://example.org/a.parquet {'0' * 64} more",
    ],
)
def test_a_list_with_a_bad_line_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "shards.list").write_text(line + "\n")
    with pytest.raises(prepare.PrepareError):
        prepare.read_addresses(tmp_path / "shards.list")
