"""Checkpoints are whole or absent, whatever happens to the writer, the disk or the file."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

from fastanila import files
from fastanila.training import checkpoint, contents, shards
from fastanila.training.checkpoint import CheckpointError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8)


def example():
    """Every dtype, layout and degenerate shape, with bits that arithmetic would not keep."""
    torch.manual_seed(0)
    nans = torch.tensor([0x7FC00001, 0x7F800123, -0x3FFFFF, -0x80000000], dtype=torch.int32).view(torch.float32)
    shared = torch.arange(6.0)
    tensors = {f"dtype.{dtype}": (10 * torch.randn(3, 5)).to(dtype) for dtype in DTYPES}
    return tensors | {
        "nan payloads, -0.0": nans,
        "number": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(4, 3).T,
        "strided": torch.arange(20)[::3],
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1, 3).expand(4, 3),
        "shared": shared,
        "shared, a part of it": shared[2:4],
        "parameter é": torch.nn.Parameter(torch.randn(3)),
    }


def small():
    return {"weight": torch.arange(4.0), "count": torch.tensor(7)}


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def raw(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def leftovers(directory):
    return [path.name for path in directory.iterdir() if path.name.endswith(".tmp")]


def test_round_trip_bit_for_bit(tmp_path):
    tensors, state = example(), {"iteration": 12, "loss": 0.1, "nested": {"a": [1, None, 'é"\\']}, "seed": 2**64 - 1}
    checkpoint.save(tmp_path / "a.safetensors", tensors, state)
    loaded, loaded_state = checkpoint.load(tmp_path / "a.safetensors")
    assert loaded_state == state and set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert same_bits(loaded[name], tensor), name
        assert loaded[name].is_contiguous() and not loaded[name].requires_grad
    assert leftovers(tmp_path) == []


def test_nothing_at_all_round_trips(tmp_path):
    checkpoint.save(str(tmp_path / "a"), {}, {})
    assert checkpoint.load(str(tmp_path / "a")) == ({}, {})


def test_loaded_tensors_do_not_hang_on_the_file(tmp_path):
    path = tmp_path / "a"
    checkpoint.save(path, small(), {})
    loaded, _ = checkpoint.load(path)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert same_bits(loaded["weight"], torch.arange(4.0))
    loaded["weight"].add_(1)  # writable


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensors(tmp_path):
    tensor = torch.randn(3, 5, device="cuda").T
    checkpoint.save(tmp_path / "a", {"x": tensor}, {})
    loaded, _ = checkpoint.load(tmp_path / "a", device="cuda")
    assert loaded["x"].is_cuda and same_bits(loaded["x"], tensor)


def test_other_tools_can_read_it(tmp_path):
    from safetensors import safe_open

    checkpoint.save(tmp_path / "a.safetensors", small(), {"iteration": 3})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("weight"), torch.arange(4.0))
        assert json.loads(file.metadata()["state"]) == {"iteration": 3}


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, small(), {"iteration": 3})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"a\.safetensors"):
            checkpoint.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        checkpoint.load(path)


def test_any_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, small(), {"iteration": 3})
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"a\.safetensors"):
            checkpoint.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"x" * 7, b"\0" * 64, b"\xff" * 64, b"PK\x03\x04" * 50, b"\x02" + b"\0" * 7 + b"[]", b"{}" * 90]
)
def test_foreign_files_are_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        checkpoint.load(tmp_path / "a")


def test_a_safetensors_file_without_a_digest_is_refused(tmp_path):
    from safetensors.torch import save_file

    for metadata in (None, {"format": "pt"}, {"state": "{}"}):
        save_file(small(), tmp_path / "a", metadata)
        with pytest.raises(CheckpointError, match="digest"):
            checkpoint.load(tmp_path / "a")


def test_a_pickle_is_never_unpickled(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    (tmp_path / "a").write_bytes(pickle.dumps(Malicious()))
    torch.save({"x": Malicious()}, tmp_path / "b")
    for name in "ab":
        with pytest.raises(CheckpointError):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "owned").exists()
    pickle.loads((tmp_path / "a").read_bytes())  # the trap works
    assert (tmp_path / "owned").exists()


def test_a_missing_file_is_not_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "absent")


@pytest.mark.parametrize("stopped_by", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch, call, stopped_by):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, small(), {"iteration": 1})

    def stop(*_):
        raise stopped_by

    with monkeypatch.context() as patched:
        patched.setattr(os, call, stop)
        with pytest.raises(type(stopped_by)):
            checkpoint.save(path, {"weight": torch.zeros(9)}, {"iteration": 2})
    tensors, state = checkpoint.load(path)
    assert state == {"iteration": 1} and same_bits(tensors["weight"], torch.arange(4.0))
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "a"
    checkpoint.save(path, small(), {"iteration": 1})
    opened = open

    def open_full(file, mode="r", **options):
        opened(file, mode, **options).close()
        return opened("/dev/full", "wb")

    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", open_full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(path, {"weight": torch.zeros(99_999)}, {"iteration": 2})
    assert checkpoint.load(path)[1] == {"iteration": 1} and leftovers(tmp_path) == []


def test_what_json_cannot_hold_is_refused_before_writing(tmp_path):
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path / "a", small(), {"x": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_save_numbered_keeps_the_newest(tmp_path):
    directory = tmp_path / "run" / "checkpoints"
    assert checkpoint.latest(directory) is None
    for iteration in (5, 10, 99_999_999, 100_000_000):
        written = checkpoint.save_numbered(directory, iteration, small(), {"iteration": iteration})
        assert checkpoint.latest(directory) == written
    assert sorted(path.name for path in directory.iterdir()) == ["100000000.safetensors", "99999999.safetensors"]
    assert checkpoint.load_latest(directory)[1] == {"iteration": 100_000_000}
    # begun again from an earlier one: what was just written stays
    checkpoint.save_numbered(directory, 20, small(), {}, keep=1)
    assert sorted(path.name for path in directory.iterdir()) == ["00000020.safetensors", "100000000.safetensors"]
    with pytest.raises(ValueError, match="keep"):
        checkpoint.save_numbered(directory, 1, small(), {}, keep=0)


def test_the_old_ones_go_only_after_the_new_one_is_safe(tmp_path, monkeypatch):
    for iteration in (1, 2):
        checkpoint.save_numbered(tmp_path, iteration, small(), {"iteration": iteration})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        checkpoint.save_numbered(tmp_path, 3, small(), {}, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001.safetensors", "00000002.safetensors"]


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / ".00000001.safetensors.0123abcd.tmp").write_bytes(b"torn")
    (tmp_path / "notes.tmp").write_text("mine")
    (tmp_path / "best.safetensors").write_text("mine too")
    assert checkpoint.latest(tmp_path) is None
    for iteration in (2, 3, 4):
        checkpoint.save_numbered(tmp_path, iteration, small(), {}, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.tmp", "best.safetensors", "00000004.safetensors"}


def test_load_latest_passes_over_damaged_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        checkpoint.load_latest(tmp_path)
    for iteration in (1, 2, 3):
        checkpoint.save_numbered(tmp_path, iteration, small(), {"iteration": iteration}, keep=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.load_latest(tmp_path)[1] == {"iteration": 3}
    (tmp_path / "00000003.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match=r"00000003\.safetensors"):
        assert checkpoint.load_latest(tmp_path)[1] == {"iteration": 2}
    for iteration in (1, 2):
        (tmp_path / f"0000000{iteration}.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match=tmp_path.name):
        checkpoint.load_latest(tmp_path)


WRITERS = """
import builtins, os, sys, time, torch
from fastanila.training import checkpoint

def slow_open(*arguments, real=builtins.open, **options):
    file = real(*arguments, **options)
    if arguments[1:] != ("xb",):
        return file
    class Slow:  # so that most moments are in the middle of a file
        def __enter__(self): return self
        def __exit__(self, *error): file.close()
        def __getattr__(self, name): return getattr(file, name)
        def write(self, content):
            for start in range(0, len(content), 1 << 16):
                file.write(content[start:start + (1 << 16)])
                file.flush()
                time.sleep(0.002)
    return Slow()

builtins.open = slow_open
for line in sys.stdin:  # one writer a line, forked because importing torch takes longer than a trial
    directory, first = line.split()
    writer = os.fork()
    if writer == 0:
        print("writer", os.getpid(), flush=True)
        for iteration in range(int(first), 1_000_000):
            x = torch.full((100_000,), float(iteration))
            checkpoint.save_numbered(directory, iteration, {"x": x}, {"iteration": iteration})
            print(iteration, flush=True)
    print("killed by", os.WTERMSIG(os.waitpid(writer, 0)[1]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_sigkill_at_any_moment_loses_no_finished_checkpoint(tmp_path):
    torn = last = 0
    waits = torch.rand(20, generator=torch.Generator().manual_seed(0)).tolist()
    with subprocess.Popen(
        [sys.executable, "-c", WRITERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writers:
        for trial, wait in enumerate(waits):
            directory = tmp_path / str(trial % 3)  # a later trial starts among what an earlier one left
            print(directory, last + 1, file=writers.stdin, flush=True)
            words = writers.stdout.readline().split()
            assert words[0] == "writer"
            reported = int(writers.stdout.readline())
            time.sleep(0.1 * wait)
            os.kill(int(words[1]), signal.SIGKILL)
            while not (line := writers.stdout.readline()).startswith("killed"):
                reported = int(line)
            assert int(line.split()[-1]) == signal.SIGKILL
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # nothing damaged has a checkpoint's name
                tensors, state = checkpoint.load_latest(directory)
            last = state["iteration"]
            assert last in (reported, reported + 1)  # finished, perhaps before it could be said
            assert (tensors["x"] == last).all()
            assert checkpoint.latest(directory).name == f"{last:08d}.safetensors"
            assert len(leftovers(directory)) <= 1
            torn += len(leftovers(directory))
        writers.stdin.close()
    assert torn > 0  # the kills did hit the middle of a file
    checkpoint.save_numbered(directory, last + 1, {}, {})
    assert leftovers(directory) == []


# ------------------------------------------------------------------------------------------------------------ shards


def large():
    """Some of which must be cut between rows at 1,000 bytes a file: first, last, alone, and rows larger than a file."""
    torch.manual_seed(3)
    return {
        "small": torch.randn(3),
        "chains": torch.randn(77, 3, 2),  # 1,848 bytes
        "exactly a file": torch.randn(25, 10),
        "number": torch.tensor(7),
        "bytes": torch.arange(255, dtype=torch.uint8).repeat(12).reshape(-1, 4)[:, :3],  # not contiguous
        "two rows": torch.randn(2, 300).to(torch.bfloat16),  # rows of 600 bytes
        "long rows": torch.randn(2, 400),  # 1,600 bytes each: they cannot be cut
        "transposed": torch.randn(40, 30).T,
        "empty": torch.empty(0, 4),
        "one element": torch.randn(1),
    }


def sizes(directory):
    """Bytes of tensors by file."""
    from safetensors import safe_open

    found = {}
    for path in directory.iterdir():
        with safe_open(path, framework="pt") as file:
            found[path.name] = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118
    return found


def test_what_is_large_goes_into_shards_and_comes_back_bit_for_bit(tmp_path, monkeypatch):
    path, state = tmp_path / "00000003.safetensors", {"iteration": 3}
    assert checkpoint.save(path, large(), state) == [] and len(list(tmp_path.iterdir())) == 1
    with monkeypatch.context() as patched:
        patched.setattr(shards, "LARGEST", 1000)
        beside = checkpoint.save(path, large(), state)
    held = sizes(tmp_path)
    assert len(beside) == len(held) - 1 > 8 and {shard.name for shard in beside} == held.keys() - {path.name}
    assert all(sum(of) <= 1000 or of == [1600] for of in held.values())
    loaded, loaded_state = checkpoint.load(path)
    assert loaded_state == state and loaded.keys() == large().keys()
    assert all(same_bits(loaded[name], tensor) for name, tensor in large().items())


def test_the_files_of_a_large_run_stay_below_16_mb(tmp_path):
    checkpoint.save(tmp_path / "a.safetensors", {"start.population": torch.zeros(1400, 3, 32, 32)}, {})  # 17.2 MB
    written = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(written) == 2 and max(written) < 16_000_000


def test_shards_that_are_damaged_missing_or_of_another_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "LARGEST", 1000)
    path, other = tmp_path / "00000003.safetensors", tmp_path / "00000004.safetensors"
    beside = checkpoint.save(path, large(), {})
    others = checkpoint.save(other, {k: v + 1 for k, v in large().items()}, {})
    for shard, another in zip(beside, others, strict=True):
        whole = shard.read_bytes()
        for content in (b"", whole[:-1], whole + b"\0", whole[:-1] + bytes([whole[-1] ^ 1]), another.read_bytes()):
            shard.write_bytes(content)
            with pytest.raises(CheckpointError):
                checkpoint.load(path)
        shard.unlink()
        with pytest.raises(CheckpointError, match=rf"shard .*{shard.name} is missing"):
            checkpoint.load(path)
        shard.write_bytes(whole)
    checkpoint.load(path)
    whole = path.read_bytes()
    for place in range(whole.index(b'"shards"'), whole.index(b"]", whole.index(b'"shards"'))):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            checkpoint.load(path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_save_in_shards_replaces_all_or_nothing(tmp_path, monkeypatch, call):
    """A number saved anew, stopped at each of its files: what was there before is whole, and nothing is left over once
    a later save ends."""
    monkeypatch.setattr(shards, "LARGEST", 1000)
    checkpoint.save_numbered(tmp_path, 3, large(), {"turn": 0})
    before = sorted(tmp_path.iterdir())
    real, count = getattr(os, call), len(before)
    for stopped_at in range(count):
        calls = iter(range(count))

        def stop(*arguments, calls=calls, stopped_at=stopped_at):
            directories = call == "fsync" and os.path.isdir(f"/proc/self/fd/{arguments[0]}")
            if not directories and next(calls) == stopped_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(os, call, stop)
            with pytest.raises(OSError):
                checkpoint.save_numbered(tmp_path, 3, {k: v + 1 for k, v in large().items()}, {"turn": 1})
        tensors, state = checkpoint.load_latest(tmp_path)
        assert state == {"turn": 0} and all(same_bits(tensors[k], v) for k, v in large().items())
    checkpoint.save_numbered(tmp_path, 3, large(), {"turn": 2})
    assert checkpoint.load_latest(tmp_path)[1] == {"turn": 2} and len(list(tmp_path.iterdir())) == count


def test_shards_go_with_their_checkpoint_and_nothing_else_does(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "LARGEST", 1000)
    (tmp_path / "00000009-1-0123abcd.safetensors").write_bytes(b"of a killed writer")
    mine = tmp_path / "00000009-best.safetensors"
    mine.write_text("mine")
    for iteration in (1, 2, 3, 4):
        checkpoint.save_numbered(tmp_path, iteration, large(), {"iteration": iteration}, also=(1,))
    names = {path.name for path in tmp_path.iterdir() if path != mine}
    assert mine.exists() and {name[:8] for name in names} == {"00000001", "00000003", "00000004"}
    for iteration in (1, 3, 4):
        assert checkpoint.load(tmp_path / f"{iteration:08d}.safetensors")[1] == {"iteration": iteration}
    checkpoint.delete_after(tmp_path, 1)
    assert {path.name[:8] for path in tmp_path.iterdir() if path != mine} == {"00000001"}
    assert checkpoint.load_latest(tmp_path)[1] == {"iteration": 1}


def test_a_reader_beside_a_writer_finds_shards_that_go_together(tmp_path, monkeypatch):
    """What it has read the first file of is saved anew, or deleted for a later one, before it reads the shards."""
    monkeypatch.setattr(shards, "LARGEST", 1000)
    path = checkpoint.save_numbered(tmp_path, 3, large(), {"turn": 0})
    real, then = checkpoint._read, []

    def read(path, blob):
        if then:
            then.pop()()
        return real(path, blob)

    monkeypatch.setattr(checkpoint, "_read", read)
    then.append(lambda: checkpoint.save_numbered(tmp_path, 3, {k: v + 1 for k, v in large().items()}, {"turn": 1}))
    assert checkpoint.load(path)[1] == {"turn": 1}
    then.append(lambda: checkpoint.save_numbered(tmp_path, 4, large(), {"turn": 2}, keep=1))
    assert checkpoint.load_latest(tmp_path)[1] == {"turn": 2}


def test_write_text_replaces_a_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    files.write_text(path, "first é\n")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError):
            files.write_text(path, "second")
    assert path.read_text(encoding="utf-8") == "first é\n" and len(list(tmp_path.iterdir())) == 1
    files.write_text(path, "third")
    assert path.read_text() == "third"


def test_prefixed_and_subset_are_inverse():
    tensors = {"a.b": torch.zeros(1), "c": torch.ones(1)}
    both = checkpoint.prefixed("energy", tensors) | checkpoint.prefixed("energy2", {"d": torch.zeros(2)})
    assert checkpoint.subset(both, "energy") == tensors
    assert checkpoint.subset(both, "ener") == {}


def trained(steps, model, optimizer):
    generator = torch.Generator().manual_seed(steps[0])
    for _ in range(*steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 5, 5, generator=generator)).square().mean().backward()
        optimizer.step()


def network():
    torch.manual_seed(1)
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.SiLU(), torch.nn.Flatten(), torch.nn.Linear(36, 1)]
    model = torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)
    return model, [name for name, _ in model.named_parameters()]


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.5, 0.9)),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_resumed_optimizer_goes_on_bit_for_bit(tmp_path, kind):
    def resumed(with_optimizer):
        model, names = network()
        optimizer = OPTIMIZERS[kind](model.parameters())
        loaded, _ = checkpoint.load(tmp_path / "a")
        model.load_state_dict(checkpoint.subset(loaded, "model"))
        if with_optimizer:
            checkpoint.restore_optimizer(optimizer, names, loaded)
        trained((3, 6), model, optimizer)
        return model, optimizer

    model, names = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    trained((0, 3), model, optimizer)
    tensors = checkpoint.prefixed("model", model.state_dict()) | checkpoint.optimizer_tensors(optimizer, names)
    checkpoint.save(tmp_path / "a", tensors, {})
    trained((3, 6), model, optimizer)

    again, its_optimizer = resumed(True)
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    before, after = (checkpoint.optimizer_tensors(o, names) for o in (optimizer, its_optimizer))
    assert before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)
    assert all(before[name].stride() == after[name].stride() for name in before)  # channels_last stays so
    forgetful, _ = resumed(False)
    differs = [not same_bits(a, b) for a, b in zip(model.parameters(), forgetful.parameters(), strict=True)]
    assert any(differs) == (kind != "sgd")  # which has no memory


def test_the_entries_have_readable_names():
    model, names = network()
    optimizer = torch.optim.Adam(model.parameters())
    assert set(checkpoint.optimizer_tensors(optimizer, names)) == {f"optimizer.untouched.{name}" for name in names}
    trained((0, 1), model, optimizer)
    kinds = ("exp_avg", "exp_avg_sq", "step")
    expected = {f"optimizer.{kind}.{name}" for kind in kinds for name in names}
    assert set(checkpoint.optimizer_tensors(optimizer, names)) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"fused": True}])
def test_an_optimizer_on_cuda(tmp_path, options):
    def fresh():
        weight = torch.nn.Parameter(torch.ones(5, device="cuda"))
        return weight, torch.optim.Adam([weight], **options)

    weight, optimizer = fresh()
    weight.grad = torch.arange(5.0, device="cuda")
    optimizer.step()
    checkpoint.save(tmp_path / "a", checkpoint.optimizer_tensors(optimizer, ["w"]), {})
    other, restored = fresh()
    checkpoint.restore_optimizer(restored, ["w"], checkpoint.load(tmp_path / "a")[0])
    for kind, value in optimizer.state[weight].items():
        assert restored.state[other][kind].device == value.device and same_bits(restored.state[other][kind], value)
    other.data.copy_(weight.data)
    other.grad = weight.grad = weight.grad + 1
    optimizer.step()
    restored.step()
    assert same_bits(weight, other)


def test_untouched_parameters_and_new_optimizers_round_trip():
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.Adam([{"params": [used]}, {"params": [unused], "lr": 0.5}])
    names = ["used", "unused"]
    new = checkpoint.optimizer_tensors(optimizer, names)
    used.grad = torch.ones(2)
    optimizer.step()
    one = checkpoint.optimizer_tensors(optimizer, names)
    for tensors, expected in ((new, set()), (one, {used})):
        checkpoint.restore_optimizer(optimizer, names, tensors)
        assert set(optimizer.state) == expected
    assert optimizer.param_groups[1]["lr"] == 0.5


def test_restored_state_is_a_copy():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.ones(2)
    optimizer.step()
    tensors = {name: tensor.clone() for name, tensor in checkpoint.optimizer_tensors(optimizer, ["w"]).items()}
    checkpoint.restore_optimizer(optimizer, ["w"], tensors)
    optimizer.step()
    assert tensors["optimizer.step.w"] == 1 and optimizer.state[weight]["step"] == 2


def test_entries_that_do_not_fit_are_named_and_change_nothing():
    model, names = network()
    optimizer = torch.optim.Adam(model.parameters())
    trained((0, 2), model, optimizer)
    whole = {name: tensor.clone() for name, tensor in checkpoint.optimizer_tensors(optimizer, names).items()}
    entry = "optimizer.exp_avg_sq.3.weight"
    bias, step = "optimizer.exp_avg.3.bias", "optimizer.step.0.bias"
    wrong = {
        entry: [
            {name: tensor for name, tensor in whole.items() if name != entry},
            whole | {entry: torch.zeros(36)},
            whole | {entry: whole[entry].double()},
            whole | {entry: torch.tensor(0.0)},
        ],
        step: [whole | {step: torch.zeros(1)}],
        bias: [{name: tensor for name, tensor in whole.items() if not name.endswith("3.bias")}],
        "optimizer.exp_avg.4.weight": [whole | {"optimizer.exp_avg.4.weight": torch.zeros(1)}],
        "optimizer.momentum.0.weight": [whole | {"optimizer.momentum.3.bias": torch.zeros(1)}],
        "optimizer.untouched.0.weight": [{}, {"model.0.weight": torch.zeros(1)}],
    }
    for name, attempts in wrong.items():
        for tensors in attempts:
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                checkpoint.restore_optimizer(optimizer, names, tensors)
    after = checkpoint.optimizer_tensors(optimizer, names)
    assert all(same_bits(whole[name], after[name]) for name in whole)
    for bad in (names[:-1], names[:-1] + names[:1]):
        with pytest.raises(ValueError, match="names"):
            checkpoint.optimizer_tensors(optimizer, bad)


def test_state_that_is_not_tensors_is_refused():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([weight])
    optimizer.step(lambda: weight.square().sum())
    with pytest.raises(TypeError, match="not a tensor"):
        checkpoint.optimizer_tensors(optimizer, ["w"])


def test_what_is_packed_is_read_back_by_its_own_names():
    def network(base):
        names = ("layers.weight", "energy.bias")
        values = {name: torch.full((2,), base + i) for i, name in enumerate(names)}
        return contents.Network(
            values, {k: v + 10 for k, v in values.items()}, {"optimizer.exp_avg.x": values[names[0]]}
        )

    both = network(0.0), network(5.0)
    z = torch.arange(6.0).reshape(3, 2)
    of = contents.Contents(*both, {"population": z}, z, -z, 7, 1.5, {"training": {}}, (-4.0, 4.0))
    of = of._replace(rollbacks=[contents.Rollback(6, 4, 2**64 - 3, 0.5)], good=[2, 4])
    tensors, state = contents.packed(of)
    assert {"energy.layers.weight", "ema.layers.weight", "optimizer.exp_avg.x", "amortized.vae.energy.bias"} <= set(
        tensors
    )
    assert {"start.population", "proposals"} <= set(tensors) and "chains" not in tensors
    back = contents.unpacked(tensors, json.loads(json.dumps(state)))
    assert back.box == of.box and back.iteration == 7 and back.fingerprint == of.fingerprint
    assert back.rollbacks == of.rollbacks and back.good == of.good
    for a, b in zip((back.energy, back.vae), both, strict=True):
        for found, kept in zip(a, b, strict=True):
            assert found.keys() == kept.keys() and all(torch.equal(found[k], kept[k]) for k in kept)
    fresh = of._replace(vae=None, proposals=None, start={}, energy=both[0]._replace(average=None))
    tensors, state = contents.packed(fresh)
    assert torch.equal(tensors["chains"], z)
    old = contents.unpacked(tensors, {"iteration": 7, "seconds": 1.5})  # as checkpoints of before had it
    assert (
        not old.rollbacks
        and not old.good
        and old.box is None
        and old.fingerprint is None
        and old.vae is None
        and old.energy.average is None
    )
