"""Gate files: what is written comes back, and nothing else is ever loaded."""

import json
import os
import pickle
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from seer_compile.budget_curve import BudgetCurve
from seer_compile.calibration import verified_file
from seer_compile.calibration.storage import (
    SCHEMA,
    describe_gates,
    fingerprint,
    load_gates,
    save_gates,
)
from seer_compile.config import Fraction, GateConfig
from seer_compile.errors import (
    CheckpointWriteError,
    GateFileCorruptedError,
    GateFileError,
    GateFileSchemaError,
    GateFileTruncatedError,
    GateMismatchError,
    ModelStateError,
    NonFiniteGateError,
    UnsafeGateFileError,
)
from seer_compile.gate_store import GateStore
from support.inputs import generator

CONFIG = GateConfig(gate_dim=16)
CURVE = BudgetCurve(
    selector="top_p",
    lengths=(1024, 4096),
    budgets=(0.5, 0.9, 1.0),
    densities=((0.1, 0.4, 1.0), (0.05, 0.2, 1.0)),
    captured_mass=((0.6, 0.92, 1.0), (0.55, 0.9, 1.0)),
)


def base_model(seed=0, width=8):
    model = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator(seed)))
    return model


def trained_store(sites=("a.attn", "b.attn"), config=CONFIG, seed=0):
    store = GateStore(config)
    for name in sites:
        gate = store.get_or_create(name, heads=4, kv_heads=2, head_dim=8)
        with torch.no_grad():
            for place, weight in enumerate(gate.parameters()):
                weight.copy_(torch.randn(weight.shape, generator=generator(seed + place)))
        gate.curve, gate.is_trained = CURVE, True
    store.set_budget(density=0.3) if config.selector.name == "top_p" else None
    store.write_metadata()
    return store


def snapshot(store):
    return {key: value.clone() for key, value in store.state_dict().items()}


def assert_same_state(store, before):
    after = store.state_dict()
    assert set(after) == set(before)
    for key, value in before.items():
        assert torch.equal(after[key], value), key


@pytest.fixture
def gate_file(tmp_path):
    path = tmp_path / "gates.safetensors"
    save_gates(trained_store(), path, model=fingerprint(base_model()), calibration={"steps": 3})
    return path


def test_saved_gates_come_back_equal_in_an_empty_store(gate_file):
    expected, store = trained_store(), GateStore(CONFIG)
    summary = load_gates(store, gate_file, model=fingerprint(base_model()))
    assert summary == {"steps": 3}
    assert store.names() == expected.names()
    assert_same_state(store, snapshot(expected))
    assert all(gate.curve == CURVE and gate.is_trained for _, gate in store.items())


def test_loading_keeps_the_parameter_objects_that_compiled_graphs_hold(gate_file):
    store = GateStore(CONFIG)
    gate = store.get_or_create("a.attn", heads=4, kv_heads=2, head_dim=8)
    store.get_or_create("b.attn", heads=4, kv_heads=2, head_dim=8)
    addresses = [tensor.data_ptr() for tensor in (gate.query_weight, gate.budget, gate.mode)]
    store.set_mode(True)
    assert int(gate.mode) == 0
    load_gates(store, gate_file, model=fingerprint(base_model()))
    assert store.get("a.attn") is gate
    after = [tensor.data_ptr() for tensor in (gate.query_weight, gate.budget, gate.mode)]
    assert after == addresses
    assert int(gate.mode) == 1


def test_same_gates_give_the_same_bytes(tmp_path, gate_file):
    save_gates(
        trained_store(),
        tmp_path / "again.safetensors",
        model=fingerprint(base_model()),
        calibration={"steps": 3},
    )
    assert (tmp_path / "again.safetensors").read_bytes() == gate_file.read_bytes()


def test_file_is_plain_safetensors_and_describes_itself(gate_file):
    assert "a.attn.query_weight" in safetensors.torch.load_file(gate_file)
    header = describe_gates(gate_file)
    assert header["sites"] == ["a.attn", "b.attn"]
    assert header["model"]["architecture"] == "Sequential"
    assert header["store"]["gates"][0]["curve"]["lengths"] == [1024, 4096]


def _bit_flips(data, count):
    header = 8 + struct.unpack("<Q", data[:8])[0]
    draw = generator(1)
    for place in range(count):
        # Half in the header, which is a small part of the file.
        end = header if place % 2 else len(data)
        at = int(torch.randint(0, end, (), generator=draw))
        changed = bytearray(data)
        changed[at] ^= 1 << int(torch.randint(0, 8, (), generator=draw))
        yield f"bit flip at {at}", bytes(changed)


def _cuts(data):
    for size in [*range(12), *(len(data) * part // 40 for part in range(1, 40)), len(data) - 1]:
        yield f"cut to {size}", data[:size]
    for extra in (b"\0", b"x" * 8, data):
        yield f"{len(extra)} bytes more", data + extra


def _pages(data, size=64):
    for start in range(0, len(data) - size, max(size, len(data) // 40)):
        yield f"zeros at {start}", data[:start] + bytes(size) + data[start + size :]


def _rewritten(data):
    """Files that safetensors itself finds valid: only our digests can tell."""
    tensors = safetensors.torch.load(data)
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    metadata = header["__metadata__"]

    def pack(changed, meta=metadata):
        return safetensors.torch.save(changed, meta)

    names = sorted(tensors)
    for name in names:
        rest = {key: value for key, value in tensors.items() if key != name}
        yield f"{name} renamed", pack({**rest, name.replace("attn", "attm"): tensors[name]})
        yield f"{name} removed", pack(rest)
        yield f"{name} halved", pack({**rest, name: tensors[name] / 2})
        yield f"{name} other type", pack({**rest, name: tensors[name].view(torch.int32)})
        yield f"{name} flat", pack({**rest, name: tensors[name].reshape(-1)})
        yield f"{name} NaN", pack({**rest, name: tensors[name] * float("nan")})
    for left, right in (("a", "b"),):
        for kind in ("query_weight", "key_weight"):
            one, two = f"{left}.attn.{kind}", f"{right}.attn.key_weight"
            swapped = {**tensors, one: tensors[two], two: tensors[one]}
            yield f"{kind} swapped", pack(swapped)
    yield "tensor added", pack({**tensors, "c.attn.query_weight": torch.zeros(2)})
    yield "no metadata", safetensors.torch.save(tensors)
    yield "empty metadata", pack(tensors, {})
    yield "metadata is a list", pack(tensors, {"seer": "[1]"})
    yield "metadata nests", pack(tensors, {"seer": "[" * 100_000})
    content = json.loads(metadata["seer"])
    for path, value in (
        (("schema",), SCHEMA + 1),
        (("schema",), str(SCHEMA)),
        (("schema",), None),
        (("digest",), "0" * 64),
        (("header", "format"), "other"),
        (("header", "sites"), ["a.attn"]),
        (("header", "model"), {}),
        (("header", "store", "seed"), 7),
        (("header", "auto_map"), {"AutoModel": "evil.Model"}),
        (("tensors", "a.attn.budget", "sha256"), "0" * 64),
    ):
        changed = json.loads(metadata["seer"])
        place = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        assert changed != content
        yield f"{path} = {value}", pack(tensors, {"seer": json.dumps(changed)})


def test_no_damaged_file_is_loaded(tmp_path, gate_file):
    data, model = gate_file.read_bytes(), fingerprint(base_model())
    store = trained_store(seed=50)
    before, path = snapshot(store), tmp_path / "damaged.safetensors"
    cases = [*_bit_flips(data, 240), *_cuts(data), *_pages(data), *_rewritten(data)]
    assert len(cases) >= 300
    kinds = set()
    for what, damaged in cases:
        if damaged == data:
            continue
        path.write_bytes(damaged)
        with pytest.raises(GateFileError) as caught:
            load_gates(store, path, model=model)
        assert type(caught.value) is not GateFileError, what
        kinds.add(type(caught.value))
    assert_same_state(store, before)
    assert {GateFileCorruptedError, GateFileTruncatedError, GateFileSchemaError} <= kinds


def test_honest_file_with_non_finite_weights_is_refused_when_written_and_when_read(tmp_path):
    store = trained_store()
    with torch.no_grad():
        store.get("b.attn").key_weight[0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteGateError, match=r"b\.attn\.key_weight"):
        save_gates(store, tmp_path / "gates.safetensors", model={})
    assert list(tmp_path.iterdir()) == []
    tensors = {
        f"{name}.{kind}": getattr(gate, kind)
        for name, gate in store.items()
        for kind in ("query_weight", "key_weight", "budget")
    }
    header = {
        "format": "seer_compile gates",
        "library": "0",
        "model": {},
        "sites": list(store.names()),
        "store": store.describe(),
        "calibration": {},
    }
    (tmp_path / "bad.safetensors").write_bytes(verified_file.encode(tensors, header, schema=SCHEMA))
    with pytest.raises(NonFiniteGateError):
        load_gates(GateStore(CONFIG), tmp_path / "bad.safetensors", model={})


@pytest.mark.parametrize("schema", [SCHEMA - 1, SCHEMA + 1])
def test_another_schema_is_named(schema, tmp_path, gate_file):
    data = gate_file.read_bytes()
    parsed = verified_file.parse_header(data, schema=SCHEMA, source="x")
    tensors = verified_file.read_tensors(data, parsed, source="x")
    gate_file.write_bytes(verified_file.encode(tensors, parsed.header, schema=schema))
    with pytest.raises(GateFileSchemaError, match=f"schema {schema}"):
        load_gates(GateStore(CONFIG), gate_file, model=fingerprint(base_model()))


class _Canary:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["gates.safetensors", "gates.pth", "gates.bin", "gates"])
def test_pickles_are_refused_and_never_run(tmp_path, protocol, name):
    canary, path = tmp_path / "canary", tmp_path / name
    path.write_bytes(pickle.dumps(_Canary(canary), protocol=protocol))
    with pytest.raises(GateFileError):
        load_gates(GateStore(CONFIG), path, model={})
    if protocol >= 2:
        with pytest.raises(UnsafeGateFileError):
            load_gates(GateStore(CONFIG), path, model={})
    assert not canary.exists()


def test_torch_archive_named_safetensors_is_refused(tmp_path):
    path = tmp_path / "gates.safetensors"
    torch.save({"a.attn.query_weight": torch.ones(2)}, path)
    with pytest.raises(UnsafeGateFileError, match="never unpickles"):
        load_gates(GateStore(CONFIG), path, model={})


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "null.safetensors").symlink_to("/dev/null")
    (tmp_path / "nowhere.safetensors").symlink_to(tmp_path / "missing")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(GateFileError):
            load_gates(GateStore(CONFIG), path, model={})
    with pytest.raises(GateFileError, match="cannot be read"):
        load_gates(GateStore(CONFIG), tmp_path / ".." / "missing" / "x", model={})


def test_saving_replaces_a_link_and_leaves_what_it_points_to(tmp_path):
    target, link = tmp_path / "precious", tmp_path / "gates.safetensors"
    target.write_text("precious")
    link.symlink_to(target)
    save_gates(trained_store(), link, model={})
    assert target.read_text() == "precious"
    assert not link.is_symlink()


def test_file_above_the_size_limit_is_not_read(gate_file):
    with pytest.raises(GateFileError, match="at most"):
        verified_file.read_bytes(gate_file, limit=100)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (base_model(width=12), "parameters"),
        (base_model(seed=9), "weight"),
        (nn.ModuleList(base_model()), "architecture"),
    ],
)
def test_gates_of_another_model_are_refused(gate_file, model, what):
    store = trained_store(seed=50)
    before = snapshot(store)
    with pytest.raises(GateMismatchError, match=what):
        load_gates(store, gate_file, model=fingerprint(model))
    assert_same_state(store, before)


def test_gates_of_other_sites_sizes_or_form_are_refused(gate_file):
    model = fingerprint(base_model())
    with pytest.raises(GateMismatchError, match=r"c\.attn: not in the file"):
        load_gates(trained_store(("a.attn", "b.attn", "c.attn")), gate_file, model=model)
    other = GateStore(CONFIG)
    other.get_or_create("a.attn", heads=8, kv_heads=2, head_dim=8)
    with pytest.raises(GateMismatchError, match="heads"):
        load_gates(other, gate_file, model=model)
    selecting = trained_store(config=GateConfig(gate_dim=16, selector=Fraction()))
    with pytest.raises(GateMismatchError, match="selector"):
        load_gates(selecting, gate_file, model=model)


def test_fingerprint_knows_a_model_in_another_precision_and_behind_wrappers(gate_file):
    model = base_model()
    assert fingerprint(torch.compile(model)) == fingerprint(model)
    for other in (model.to(torch.bfloat16), torch.compile(base_model())):
        load_gates(GateStore(CONFIG), gate_file, model=fingerprint(other))


def deep_model(layers=9):
    return nn.Sequential(*(base_model(seed) for seed in range(layers)))


def test_a_model_fine_tuned_in_one_projection_is_refused(tmp_path):
    path = tmp_path / "gates.safetensors"
    save_gates(trained_store(), path, model=fingerprint(deep_model()))
    for name, _ in deep_model().named_parameters():
        tuned = deep_model()
        tuned.get_parameter(name).data.mul_(1.01)
        with pytest.raises(GateMismatchError, match=f"weight {name}: other values"):
            load_gates(GateStore(CONFIG), path, model=fingerprint(tuned))
    for dtype in (torch.float16, torch.bfloat16):
        load_gates(GateStore(CONFIG), path, model=fingerprint(deep_model().to(dtype)))


def test_a_file_that_names_fewer_weights_still_fits_its_model(tmp_path):
    path = tmp_path / "gates.safetensors"
    model = fingerprint(deep_model())
    few = {name: model["weights"][name] for name in list(model["weights"])[::7]}
    save_gates(trained_store(), path, model=model | {"weights": few})
    load_gates(GateStore(CONFIG), path, model=model)


def test_rope_and_layer_count_belong_to_the_fingerprint():
    class Config:
        num_hidden_layers = 2
        rope_theta = 10_000.0

    model = base_model()
    model.config = Config()
    assert fingerprint(model)["config"] == {"num_hidden_layers": 2, "rope_theta": 10_000.0}


def test_weights_of_a_fine_tuned_model_can_be_accepted(gate_file):
    load_gates(
        GateStore(CONFIG), gate_file, model=fingerprint(base_model(seed=9)), check_weights=False
    )


def test_store_without_gates_cannot_be_saved(tmp_path):
    with pytest.raises(ModelStateError, match="no gates"):
        save_gates(GateStore(CONFIG), tmp_path / "gates.safetensors", model={})


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, function, gate_file):
    old = gate_file.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(CheckpointWriteError, match="No space left"):
        save_gates(trained_store(seed=3), gate_file, model={})
    monkeypatch.undo()
    assert gate_file.read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == [gate_file.name]


def test_lost_bytes_are_noticed_before_the_rename(tmp_path, monkeypatch):
    honest = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: honest(self)[:-3])
    with pytest.raises(CheckpointWriteError, match="reads back differently"):
        save_gates(trained_store(), tmp_path / "gates.safetensors", model={})
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_dead_processes_are_removed_and_of_live_ones_kept(tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    host = verified_file._host()
    stale = tmp_path / f".gates.safetensors.{host}-{int(dead.stdout)}-0.tmp"
    alive = tmp_path / f".gates.safetensors.{host}-{os.getppid()}-0.tmp"
    elsewhere = tmp_path / ".gates.safetensors.ffffffff-999999-0.tmp"
    for path in (stale, alive, elsewhere):
        path.touch()
    save_gates(trained_store(), tmp_path / "gates.safetensors", model={})
    assert not stale.exists()
    assert alive.exists()
    assert elsewhere.exists()


def test_temporary_file_is_private_and_the_final_one_keeps_its_mode(tmp_path, monkeypatch):
    path = tmp_path / "gates.safetensors"
    path.touch(mode=0o640)
    path.chmod(0o640)
    seen, replace = [], os.replace
    created = os.open

    def watch(name, flags, *rest):
        if flags & os.O_CREAT:
            seen.append(rest)
        return created(name, flags, *rest)

    monkeypatch.setattr(os, "open", watch)
    save_gates(trained_store(), path, model={})
    assert seen == [(0o600,)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.replace is replace
