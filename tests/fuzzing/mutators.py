"""What is done to a file before a reader gets it: edits of bytes, of values, of safetensors.

Requirement: every kind of damage that a disk, an editor or an adversary makes, from one source of
randomness, so that Hypothesis can drive and shrink it and a seed repeats a campaign. An edit of
values writes a well-formed file again, so that it reaches what stands behind the parser; [Raw] text
takes the place of one value, for what no encoder would write.
"""

from __future__ import annotations

import gzip
import json
import pickle
import random
import tomllib
from collections.abc import Callable
from typing import Any

Edit = Callable[[random.Random, bytes], bytes]
Path = tuple[Any, ...]

_RAW = "@raw:"


class Trap:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('a file was unpickled')",))


PICKLE = pickle.dumps(Trap())

# -- bytes


def _at(rng: random.Random, data: bytes) -> int:
    return rng.randrange(len(data)) if data else 0


def _flip_bit(rng: random.Random, data: bytes) -> bytes:
    at = _at(rng, data)
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _replace_byte(rng: random.Random, data: bytes) -> bytes:
    at = _at(rng, data)
    return data[:at] + bytes([(data[at] + rng.randrange(1, 256)) % 256]) + data[at + 1 :]


def _truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: _at(rng, data)]


def _extend(rng: random.Random, data: bytes) -> bytes:
    more = (
        b"\0",
        b"\n",
        b" ",
        b"}",
        b"{}",
        rng.randbytes(rng.randrange(1, 40)),
        data,
        b"\0" * 4096,
    )
    return data + rng.choice(more)


def _splice(rng: random.Random, data: bytes) -> bytes:
    one, two, to = sorted(_at(rng, data) for _ in range(2)), _at(rng, data), _at(rng, data)
    piece = data[one[0] : min(one[1], one[0] + 200)]
    cut = rng.choice((0, len(piece)))
    return data[:to] + piece + data[to + cut :] if two % 2 else data[: one[0]] + data[one[1] :]


def _swap_pieces(rng: random.Random, data: bytes) -> bytes:
    a, b, c = sorted(_at(rng, data) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def _insert(rng: random.Random, data: bytes) -> bytes:
    at = _at(rng, data)
    odd = (
        b"\0",
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\r\n",
        b"\\u0000",
        b"NaN",
        b"1e999",
        b"[" * 9,
    )
    return data[:at] + rng.choice(odd) + data[at:]


def _digit(rng: random.Random, data: bytes) -> bytes:
    places = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
    if not places:
        return _flip_bit(rng, data)
    at = rng.choice(places)
    return data[:at] + str(rng.randrange(10)).encode() * rng.choice((1, 1, 2)) + data[at + 1 :]


def _encoding(rng: random.Random, data: bytes) -> bytes:
    text = data.decode("latin-1")
    encoded = text.encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-8")))
    return rng.choice((encoded, b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n")))


def _foreign(rng: random.Random, data: bytes) -> bytes:
    depth = rng.choice((100, 990, 5_000, 100_000))
    whole: tuple[bytes, ...] = (
        *(b"", b"\0", b"{}", b"[]", b"null", b"0", b'""', PICKLE, gzip.compress(data)),
        *(b"[" * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth),
        *(rng.randbytes(64), b"\x80\x04.", b"PK\x03\x04" + data, b"version https://git-lfs" + data),
        *(b"[a]\n" + b"a." * depth + b"a=1\n", b"a=[" * min(depth, 5_000), b"\xff\xfe" + data),
        *(b"#" * depth, b"\n" * depth, b"(" * min(depth, 5_000), b"[policy]\n" + b"x=1\n" * 2),
    )
    return rng.choice(whole)


BYTE_EDITS: dict[str, Edit] = {
    "flip a bit": _flip_bit,
    "another byte": _replace_byte,
    "truncate": _truncate,
    "extend": _extend,
    "splice": _splice,
    "swap pieces": _swap_pieces,
    "insert": _insert,
    "another digit": _digit,
    "encoding": _encoding,
    "another format": _foreign,
}

# -- values


def _nested(opening: str, inner: str, closing: str, depth: int) -> str:
    return opening * depth + inner + closing * depth


def _atoms(rng: random.Random, toml: bool) -> str:
    """Return the text of a value that was not there. See [Raw]."""
    depth = rng.choice((3, 60, 255, 257, 300, 480, 700, 960, 975, 985, 992, 999, 10_000))
    long = json.dumps(rng.choice("x\u00e9") * rng.choice((1_000, 100_000)), ensure_ascii=False)
    common = [
        *("0", "-1", "1", "2", "-0.0", "0.5", "1e300", "true", "false", '""', "[]", "[[]]", "[0]"),
        *("1" + "0" * 25, "-1" + "0" * 400, "1" + "0" * 400, "1" + "0" * 5000, "9007199254740993"),
        *(
            '"\\u0000"',
            '"../../x"',
            '"a/b"',
            '"\\u001b[2J"',
            '"__class__"',
            long,
            "1e400",
            "-1e400",
        ),
        *('"PASS"', '"WRONG"', '"F32"', '"nccl"', '"1"', '"NaN"', '".*"', '"(a+)+$"', '"["'),
        "[" + "0," * rng.choice((10, 20_000)) + "0]",
        "[" + ",".join(map(str, range(20_000))) + "]",
        _nested("[", "", "]", depth),
        str(rng.randrange(-5, 2**70)),
        repr(rng.uniform(-4, 4)),
    ]
    if toml:
        common += [
            *(
                "nan",
                "inf",
                "-inf",
                "0x" + "f" * 5000,
                "0b" + "1" * 20_000,
                "1979-05-27",
                "00:00:00",
            ),
            *("{}", "{ a = 1 }", "'a'", "{ " + "a." * depth + "a = 1 }", "[" + "{}," * 50 + "{}]"),
            _nested("{ a = ", "1", " }", min(depth, 999)),
        ]
    else:
        common += [
            *("null", "NaN", "Infinity", "-Infinity", "{}", '{"a":1}', '"\\ud800"', "01", "1.0"),
            *("0x10", "undefined", "'a'", '{"":{}}', '{"a":1,"a":2}', '{"\\ud800":"\\udfff"}'),
            _nested('{"a":', "1", "}", depth),
            _nested('[{"a":', "1", "}]", depth // 2),
        ]
    return rng.choice(common)


def _paths(value: Any, path: Path = ()) -> list[Path]:
    found: list[Path] = [path] if path else []
    if isinstance(value, dict):
        for key, item in value.items():
            found += _paths(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            found += _paths(item, (*path, i))
    return found


def _holder(value: Any, path: Path) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


def edit_value(rng: random.Random, value: Any, *, toml: bool = False) -> Any:
    """Change one thing in a nested value, in place where that can be, and return it."""
    paths = _paths(value)
    if not paths:
        return _RAW + _atoms(rng, toml)
    # rows that are alike would take every draw: choose the depth first, then a place there
    length = rng.choice(sorted({len(path) for path in paths}))
    path = rng.choice([one for one in paths if len(one) == length])
    holder, key = _holder(value, path), path[-1]
    kind = rng.randrange(10)
    if kind < 4:
        holder[key] = _RAW + _atoms(rng, toml)
    elif kind == 4:
        del holder[key]
    elif kind == 5 and isinstance(holder, dict):
        name = rng.choice(("", "x" * 50, f"{key} ", str(key).upper(), "a.b", "__proto__", "\x00"))
        holder[name] = holder.pop(key)
    elif kind == 5:
        holder.insert(rng.randrange(len(holder) + 1), holder[key])
    elif kind == 6:
        other = rng.choice(paths)
        taken = json.loads(json.dumps(_holder(value, other)[other[-1]], default=str))
        holder[key] = taken
    elif kind == 7:
        _nudge(rng, holder, key)
    elif kind == 8 and isinstance(holder, dict):
        holder[rng.choice(("new", "schema", "outcome", "tp", "match"))] = _RAW + _atoms(rng, toml)
    else:
        holder[key] = [holder[key]] if rng.random() < 0.5 else {str(key): holder[key]}
    return value


def _nudge(rng: random.Random, holder: Any, key: Any) -> None:
    """Change a value as little as its type allows."""
    value = holder[key]
    if isinstance(value, bool):
        holder[key] = not value
    elif isinstance(value, int):
        holder[key] = rng.choice((value + 1, value - 1, -value, float(value), value * 2**33))
    elif isinstance(value, float):
        holder[key] = rng.choice((value * 1.01, -value, value * 1e9, 0.0, int(value)))
    elif isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        odd = rng.choice(("", " ", "\n", "0", "é", "PASS", "\u202e", "\x00", value))
        holder[key] = value[:at] + odd + value[at + rng.randrange(2) :]
    elif isinstance(value, list) and value:
        rng.shuffle(value)
    else:
        holder[key] = rng.choice(([], {}, "", 0))


def json_text(value: Any, indent: int | None = None) -> str:
    """Write JSON in which marked texts stand as they are. See [Raw]."""
    return _unmarked(json.dumps(value, indent=indent, ensure_ascii=False))


def toml_text(value: dict[str, Any]) -> str:
    """Write a TOML file of inline values, in which marked texts stand as they are."""
    return "".join(f"{json.dumps(str(key))} = {_toml(item)}\n" for key, item in value.items())


def _toml(value: Any) -> str:
    if isinstance(value, str) and value.startswith(_RAW):
        return value.removeprefix(_RAW)
    if isinstance(value, dict):
        inner = ", ".join(f"{json.dumps(str(key))} = {_toml(item)}" for key, item in value.items())
        return "{ " + inner + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool | int | float | str):
        return json.dumps(value)
    return json.dumps(str(value))


def _unmarked(text: str) -> str:
    """Take the quotes and escapes from marked texts."""
    pieces = text.split(f'"{_RAW}')
    made = [pieces[0]]
    for piece in pieces[1:]:
        end, escaped = 0, False
        while piece[end] != '"' or escaped:
            escaped = piece[end] == "\\" and not escaped
            end += 1
        made += [json.loads(f'"{piece[:end]}"'), piece[end + 1 :]]
    return "".join(made)


def _edited_json(rng: random.Random, data: bytes) -> bytes:
    value = edit_value(rng, json.loads(data))
    text = json_text(value, rng.choice((None, 1)))
    return text.encode("utf-8", errors="surrogatepass")


def _duplicate_key(rng: random.Random, data: bytes) -> bytes:
    """Say one key twice in one object, with another value: readers disagree on which counts."""
    value = json.loads(data)
    holders = [value] if isinstance(value, dict) else []
    for path in _paths(value):
        inner = _holder(value, path)[path[-1]]
        holders += [inner] if isinstance(inner, dict) else []
    held = [one for one in holders if one]
    if not held:
        return data + data
    holder = rng.choice(held)
    key = rng.choice(list(holder))
    first = json_text(_RAW + _atoms(rng, toml=False))
    if rng.random() < 0.5:
        first = json.dumps(holder[key])
    holder[key] = _RAW + f"{first}, {json.dumps(key)}: {json.dumps(holder[key])}"
    return json_text(value).encode("utf-8", errors="surrogatepass")


def _reordered(rng: random.Random, data: bytes) -> bytes:
    """Say the same in other words: order of keys, whitespace, escapes."""
    value = json.loads(data)
    if isinstance(value, dict):
        items = list(value.items())
        rng.shuffle(items)
        value = dict(items)
    indent = rng.choice((None, 0, 1, 2, 4))
    return json.dumps(value, indent=indent, ensure_ascii=rng.random() < 0.5).encode()


def _edited_toml(rng: random.Random, data: bytes) -> bytes:
    value = edit_value(rng, tomllib.loads(data.decode()), toml=True)
    text = toml_text(value) if isinstance(value, dict) else json_text(value)
    return text.encode("utf-8", errors="surrogatepass")


def _toml_lines(rng: random.Random, data: bytes) -> bytes:
    """Add lines that a TOML reader may take long for, or read in two ways."""
    parts = rng.choice((30, 200, 2_000, 20_000))
    lines = (
        b"a." * parts + b"a = 1\n",
        b"[" + b"a." * parts + b"a]\nb = 1\n",
        b"match." + b"a." * parts + b"a = 1\n",
        b"[[tolerance]]\nmatch." + b"a." * parts + b"a = 1\n",
        b"[policy.match]\n" + b"a." * parts + b"a = 1\n",
        b"".join(b"k%d = %d\n" % (i, i) for i in range(min(parts, 5_000))),
        b'"' * 7 + b"\n",
        b"[policy]\ntp = [2]\n",
        b"tp = 0x" + b"f" * parts + b"\n",
        b"x = '''" + b"'" * parts,
        b"x = [" + b"[" * parts,
        b"x = " + b"{a=" * min(parts, 2_000),
        b"# " + b"\x7f" * 3 + b"\n",
    )
    line = rng.choice(lines)
    return rng.choice((data + b"\n" + line, line + data))


def _lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    odd = (
        *(
            b"(",
            b"[a",
            b"a{99999999999}",
            b"(?P<n>a)(?P<n>b)",
            b"*",
            b"\\",
            b"(a+)+$",
            b"a{1,65536}",
        ),
        *(b"x" * 100_000, b"(" * 5_000 + b")" * 5_000, b"#", b" ", b"\x00", b"(?i", b"(?<=a*)b"),
        b"|".join([b"a"] * 5_000),
    )
    at = rng.randrange(len(lines) + 1)
    return b"\n".join([*lines[:at], rng.choice(odd), *lines[at + rng.randrange(2) :]])


JSON_EDITS: dict[str, Edit] = {
    "edit a value": _edited_json,
    "a key twice": _duplicate_key,
    "other words": _reordered,
}
TOML_EDITS: dict[str, Edit] = {"edit a value": _edited_toml, "odd lines": _toml_lines}
TEXT_EDITS: dict[str, Edit] = {"odd lines": _lines}

# -- safetensors


def packed(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """Return a safetensors file of a header's text and the data behind it."""
    told = len(header) if length is None else length
    return (told % 2**64).to_bytes(8, "little") + header + data


def unpacked(file: bytes) -> tuple[dict[str, Any], bytes]:
    """Return a file's header and its data."""
    length = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def _header_value(rng: random.Random, file: bytes) -> bytes:
    header, data = unpacked(file)
    text = json_text(edit_value(rng, header)).encode("utf-8", errors="surrogatepass")
    return packed(text + b" " * rng.randrange(9), data)


def _header_field(rng: random.Random, file: bytes) -> bytes:
    """Change one tensor's dtype, shape or place, perhaps so that the sizes still fit."""
    header, data = unpacked(file)
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)]
    start, stop = entry["data_offsets"]
    other = header[rng.choice(names)]
    big = rng.choice((2**31, 2**32, 2**62, 2**63, 2**64, 2**64 + 4, 10**30))
    shapes = (
        *([], [0], [0, big], [big, 0], [big], [big, big], [-1], [-1, -1], [1] * 100, [True]),
        *([big] * 5_000, entry["shape"][::-1], [*entry["shape"], 1], [1] * 5_000, [2.0], None, "4"),
    )
    offsets = (
        *(
            [stop, start],
            [-1, stop],
            [start, big],
            [big, big],
            [start, stop + 4],
            [start - 4, stop],
        ),
        *([start], [start, stop, stop], other["data_offsets"], [start + 1, stop + 1], None, [0, 0]),
        *([float(start), float(stop)], [False, stop], [2**64 - 4, stop], [start - 2**64, stop]),
    )
    dtypes = (
        "F64",
        "I32",
        "U8",
        "BF16",
        "BOOL",
        "C64",
        "F4",
        "F6_E2M3",
        "F8_E8M0",
        "Q4",
        "f32",
        "",
    )
    what = rng.randrange(6)
    if what == 0:
        entry["shape"] = rng.choice(shapes)
    elif what == 1:
        entry["data_offsets"] = rng.choice(offsets)
    elif what == 2:
        entry["dtype"] = rng.choice(dtypes)
    elif what == 3:
        one, two = rng.choice(names), rng.choice(names)
        header[one]["data_offsets"], header[two]["data_offsets"] = (
            header[two]["data_offsets"],
            header[one]["data_offsets"],
        )
    elif what == 4:
        header[rng.choice((rng.choice(names) + "x", "", "x" * 10_000, "__metadata__"))] = entry
    else:
        empty = {"dtype": rng.choice(dtypes), "shape": rng.choice(shapes), "data_offsets": [0, 0]}
        header[rng.choice(("empty", "."))] = empty
    return packed(json.dumps(header).encode(), data)


def _header_length(rng: random.Random, file: bytes) -> bytes:
    length = int.from_bytes(file[:8], "little")
    sizes = (
        0,
        1,
        length - 1,
        length + 1,
        len(file) - 8,
        len(file) - 7,
        len(file),
        10**8,
        10**8 + 1,
    )
    told = rng.choice((*sizes, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8, length + 2**32))
    return packed(file[8:], b"", told)


def _header_words(rng: random.Random, file: bytes) -> bytes:
    """Write the same header in another way: encoding, spaces, a key twice."""
    header, data = unpacked(file)
    text = json.dumps(header)
    plain = text.encode()
    name = rng.choice(list(header))
    twice = f'{{"{name}": {json.dumps(header[name])}, {text[1:]}'.encode()
    words = (
        *(text.encode("utf-16"), text.encode("utf-16-le"), text.encode("utf-8-sig"), twice),
        *(
            b" " + plain,
            b"\n" * 8 + plain,
            plain + b"\0" * 8,
            plain + b" " * 64,
            b"[" + plain + b"]",
        ),
        *(b"[" * 50_000, b'{"a":' * 50_000, b"[" + b"[]," * 20_000 + b"[]]", b"{}", b""),
    )
    return packed(rng.choice(words), data)


def _tensor_data(rng: random.Random, file: bytes) -> bytes:
    length = 8 + int.from_bytes(file[:8], "little")
    return file[:length] + rng.choice(list(BYTE_EDITS.values())[:8])(rng, file[length:] or b"\0")


SAFETENSORS_EDITS: dict[str, Edit] = {
    "edit a value": _header_value,
    "edit an entry": _header_field,
    "another length": _header_length,
    "other words": _header_words,
    "edit the data": _tensor_data,
}

EDITS: dict[str, dict[str, Edit]] = {
    "json": {**BYTE_EDITS, **JSON_EDITS},
    "toml": {**BYTE_EDITS, **TOML_EDITS},
    "text": {**BYTE_EDITS, **TEXT_EDITS},
    "pem": BYTE_EDITS,
    "safetensors": {**BYTE_EDITS, **SAFETENSORS_EDITS},
}
"""Format -> name -> edit."""
