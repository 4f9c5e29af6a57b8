"""What reaches the disk: checkpoints, small files, the metrics log, the exported model; none of it ever half-written.

A checkpoint is a folder `step-00000020/` of safetensors and JSON. It is written under a hidden name, every file and
folder fsynced, and renamed, so that under its final name it is whole; a manifest of sizes and sha256 hashes proves it
on load. Nothing is pickled. One process writes to a folder at a time.

The functions that touch the disk (`_write_tensors`, `_write_bytes`, `_fsync`, `_rename`, `_remove`) are module-level so
that tests can kill the process at each of their calls.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .config import Refusal

SHARD = "5GB"  # largest weights file of an exported model
FORMAT = 1  # of the checkpoint folder; load refuses any other
MANIFEST = "manifest.json"
STATE = "state.json"
# Tensors go to a file by prefix, without the prefix inside, so that model.safetensors holds the model's own names.
TENSOR_FILES = {"model.": "model.safetensors", "optimizer.": "optimizer.safetensors", "": "other.safetensors"}
_FINAL = re.compile(r"step-(\d{8,})")
_OLD = re.compile(r"\.step-(\d{8,})\.old-\d+")  # replaced by a save of the same step; in its place if that save died
_TEMPORARY = re.compile(r"\.step-\d{8,}\.tmp-\d+")  # being written or removed; never read


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict, *, keep_last: int) -> Path:
    """Writes `folder/step-XXXXXXXX` and returns its path; on return it has reached the disk.

    tensors: any names, dtypes, shapes and devices. state: JSON-able; `load` returns it with "step" added. A checkpoint
    of the same step is replaced. Once the new one is in place, all but the newest `keep_last` up to this step are
    removed, and those of later steps too: they continue a history that this save has left. If the process dies at any
    point, `latest` finds this checkpoint or the previous one, whole. Raises Refusal for keep_last < 1, OSError when the
    disk does (what was there stays, the temporary goes).
    """
    if keep_last < 1:
        raise Refusal(f"keep_last: found {keep_last}; accepted: 1 or more")
    if state.get("step", step) != step:
        raise ValueError(f"state says step {state['step']}, saved as step {step}")
    folder = Path(folder)
    _make_folder(folder)
    tidy(folder)
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp-{os.getpid()}"
    try:
        _write_folder(temporary, step, tensors, {"step": step} | state)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    old = folder / f".{final.name}.old-{os.getpid()}"
    if final.exists():
        _rename(final, old)  # a folder cannot be renamed over another; `latest` reads the old one until the next line
    _rename(temporary, final)
    _fsync(folder)
    if old.exists():
        _remove(old)
    steps = _steps(folder)
    kept = sorted(s for s in steps if s <= step)[-keep_last:]
    gone = {other: folder / f".step-{other:08d}.tmp-{os.getpid()}" for other in sorted(steps.keys() - set(kept))}
    for other, hidden in gone.items():  # hidden first: a removal that dies halfway must not leave a torn checkpoint
        _rename(steps[other], hidden)
    if gone:
        _fsync(folder)
    for hidden in gone.values():
        _remove(hidden)
    return final


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in `folder`, or None. Reads names only: `load` verifies."""
    steps = _steps(Path(folder))
    return steps[max(steps)] if steps else None


def tidy(folder: Path) -> None:
    """Puts back a checkpoint whose replacement died between two renames, and removes what other dead saves left.

    For the one process that writes to `folder`: it would remove what another is writing. Every save does it first.
    """
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        final = folder / entry.name[1:].split(".")[0]
        if _OLD.fullmatch(entry.name) and not final.exists():
            _rename(entry, final)
        elif _OLD.fullmatch(entry.name) or _TEMPORARY.fullmatch(entry.name):
            _remove(entry)


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors on the CPU, state) of a checkpoint, after every size and hash has been checked.

    Raises Refusal naming the file that is missing, torn (wrong size), edited (wrong hash) or unexpected.
    """
    path = Path(path)
    files = _read_manifest(path)["files"]
    present = {entry.name for entry in path.iterdir()} - {MANIFEST}
    for name in sorted(files.keys() - present):
        raise _refusal(path, name, "missing")
    for name in sorted(present - files.keys()):
        raise _refusal(path, name, "unexpected: the manifest does not list it")
    for name, expected in files.items():
        size = (path / name).stat().st_size
        if size != expected["size"]:
            raise _refusal(path, name, f"torn: found {size:,} bytes, the manifest says {expected['size']:,}")
    for name, expected in files.items():  # sizes first: hashing may take minutes
        if _sha256(path / name) != expected["sha256"]:
            raise _refusal(path, name, "edited: its sha256 is not the manifest's")
    tensors = {}
    for prefix, name in TENSOR_FILES.items():
        if name in files:
            tensors |= {prefix + key: tensor for key, tensor in load_file(path / name).items()}
    return tensors, json.loads((path / STATE).read_bytes())


def _write_folder(temporary: Path, step: int, tensors: dict[str, torch.Tensor], state: dict) -> None:
    temporary.mkdir()
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        prefix = next(p for p in TENSOR_FILES if key.startswith(p))
        groups.setdefault(TENSOR_FILES[prefix], {})[key[len(prefix) :]] = tensor.detach().cpu().contiguous()
    for name, group in groups.items():
        _write_tensors(temporary / name, group)
    _write_bytes(temporary / STATE, json.dumps(state, indent=1).encode())
    files = {p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(temporary.iterdir())}
    for name in files:
        _fsync(temporary / name)
    _write_bytes(temporary / MANIFEST, _manifest_bytes({"format": FORMAT, "step": step, "files": files}))
    _fsync(temporary / MANIFEST)
    _fsync(temporary)


def _manifest_bytes(fields: dict) -> bytes:
    """The manifest's only spelling; its own digest inside, so that an edit of the manifest itself is found too."""
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return json.dumps(fields | {"digest": digest}, indent=1, sort_keys=True).encode() + b"\n"


def _read_manifest(path: Path) -> dict:
    if not path.is_dir():
        raise Refusal(f"{path}: no checkpoint folder there{_others(path)}")
    try:
        raw = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise _refusal(path, MANIFEST, "missing") from None
    try:
        fields = json.loads(raw)
        version = fields["format"]
    except (ValueError, KeyError, TypeError):
        raise _refusal(path, MANIFEST, "broken: not the JSON that longtrace writes") from None
    if version != FORMAT:
        raise _refusal(path, MANIFEST, f"found format {version!r}; accepted: {FORMAT}")
    fields.pop("digest", None)
    if _manifest_bytes(fields) != raw:
        raise _refusal(path, MANIFEST, "edited: its own digest does not match")
    return fields


def _refusal(path: Path, name: str, found: str) -> Refusal:
    return Refusal(f"{path / name}: {found}; this checkpoint cannot be trusted{_others(path)}")


def _others(path: Path) -> str:
    others = [p.name for _, p in sorted(_steps(path.parent).items()) if p.name != path.name]
    return f"; other checkpoints in {path.parent}: {', '.join(others)} (--resume PATH)" if others else ""


def _steps(folder: Path) -> dict[int, Path]:
    """step -> folder of every whole checkpoint."""
    if not folder.is_dir():
        return {}
    entries = list(folder.iterdir())
    old = {int(m[1]): p for p in entries if (m := _OLD.fullmatch(p.name))}
    return old | {int(m[1]): p for p in entries if (m := _FINAL.fullmatch(p.name))}


# ---- random number generators ----------------------------------------------------------------------------------------


def rng_state() -> dict:
    """The state of python's, numpy's (global), torch's CPU and every CUDA device's generator; JSON-able."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, _text(np.array(words, np.uint32)), gauss],
        "numpy": [kind, _text(keys), *rest],
        "torch": _text(torch.get_rng_state().numpy()),
        "cuda": [_text(state.numpy()) for state in cuda],
    }


def set_rng_state(state: dict) -> None:
    """Restores what `rng_state` returned. Generators of CUDA devices that are not here are left out."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(_array(words, np.uint32).tolist()), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, _array(keys, np.uint32), *rest))
    torch.set_rng_state(torch.from_numpy(_array(state["torch"], np.uint8)))
    for device, saved in zip(range(torch.cuda.device_count()), state["cuda"]):
        torch.cuda.set_rng_state(torch.from_numpy(_array(saved, np.uint8)), device)


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _array(text: str, dtype: type) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).copy()


# ---- small files -----------------------------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes a small file (text as UTF-8) so that a reader finds the old content or the new one, never a part."""
    path = Path(path)
    _make_folder(path.parent)
    for leftover in path.parent.iterdir():
        if re.fullmatch(re.escape(f".{path.name}.tmp-") + r"\d+", leftover.name):
            _remove(leftover)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        _write_bytes(temporary, data.encode() if isinstance(data, str) else data)
        _fsync(temporary)
        _rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


class MetricsLog:
    """metrics.jsonl: one JSON object a line, appended as the run goes, cut back to the checkpoint on resume.

    `MetricsLog(path, 0)` starts anew; with the step of a checkpoint it drops every row after that step (a torn last
    line included) and keeps the rest byte for byte. Raises Refusal naming the line of the kept part that is not a JSON
    object with a number "step".
    """

    def __init__(self, path: Path, step: int):
        self.path, self._rows = Path(path), []
        _make_folder(self.path.parent)
        self._file = self.path.open("ab")
        self._file.truncate(self._kept(step))

    def append(self, row: dict) -> None:
        """Adds one row, handed to the system at once: a killed process loses none, a power cut those since `sync`."""
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        self._rows.append(row)

    def amend(self, values: dict) -> None:
        """Adds to the last row, which a step wrote."""
        row = self._rows.pop()
        self._file.truncate(self.path.stat().st_size - len(json.dumps(row)) - 1)
        self.append(row | values)

    def rows(self) -> list[dict]:
        """All rows: those kept and those appended."""
        return list(self._rows)

    def sync(self) -> None:
        """Puts the rows on the disk; call it before a checkpoint, so that resuming from that finds them all."""
        _fsync(self.path)

    def close(self) -> None:
        self._file.close()

    def _kept(self, step: int) -> int:
        """Reads the rows up to `step`; returns their length in bytes."""
        if step == 0:
            return 0
        kept = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break  # torn by a crash
            try:
                row = json.loads(line)
                after = row["step"] > step
            except (ValueError, KeyError, TypeError):
                raise Refusal(
                    f'{self.path}:{number}: found {line[:60]!r}; accepted: a JSON object with "step"'
                ) from None
            if after:
                break
            self._rows.append(row)
            kept += len(line)
        return kept


# ---- the exported model ----------------------------------------------------------------------------------------------


def export_model(model, tokenizer, out: Path, *, chat_template: str, dtype: torch.dtype) -> list[str]:
    """Writes a Hugging Face folder into `out` (other files there stay) and returns the names of the files written.

    model: a transformers model, or a peft model, whose adapter folder is written; if the base's context was extended, its
    config.json too: transformers then refuses the folder, where it would else run the adapters on the base's own rope
    settings (`longtrace export` merges them rightly). dtype: torch.bfloat16 or torch.float32, of the floating-point
    weights; tied weights stay tied, and above 5 GB transformers shards them. Everything is written beside, then the
    config that makes the old folder loadable is removed, then the files are moved in and the config last: at any moment
    the folder holds the old model, or the new one, or refuses to load.
    """
    out = Path(out)
    _make_folder(out)
    temporary = out / f".export.tmp-{os.getpid()}"
    for leftover in out.iterdir():
        if re.fullmatch(r"\.export\.tmp-\d+", leftover.name):
            _remove(leftover)
    temporary.mkdir()
    try:
        _save_pretrained(model, temporary, dtype)
        own_template, tokenizer.chat_template = tokenizer.chat_template, chat_template
        try:
            tokenizer.save_pretrained(temporary)
        finally:
            tokenizer.chat_template = own_template
        # a folder loads by its config: these are the first of the old files to go and the last of the new to come
        configs = [n for n in ("config.json", "adapter_config.json") if (temporary / n).exists()]
        names = [n for n in sorted(os.listdir(temporary)) if n not in configs] + configs
        for name in names:
            _fsync(temporary / name)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for name in ("adapter_config.json", "config.json"):
        _remove(out / name)
    _fsync(out)
    for name in os.listdir(out):
        if re.fullmatch(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", name):
            _remove(out / name)
    for name in names:
        if name in configs:
            _fsync(out)  # the weights are down before the config that names them
        _rename(temporary / name, out / name)
    _fsync(out)
    _remove(temporary)
    return names


def _save_pretrained(model, folder: Path, dtype: torch.dtype) -> None:
    cast: dict[tuple, torch.Tensor] = {}  # by storage, so that two names of one tensor stay one tensor

    def to(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if key not in cast:
            cast[key] = tensor.detach().to("cpu", dtype)
        return cast[key]

    adapters = hasattr(model, "peft_config")
    # of a LoRA model only the adapters are written: the base need not be copied off its device
    state = {n: to(tensor) for n, tensor in model.state_dict().items() if not adapters or "lora_" in n}
    if adapters:
        model.save_pretrained(folder, state_dict=state)
        model.get_base_model().generation_config.save_pretrained(folder)  # where trained turns end
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
        base = model.get_base_model().config
        if not _same_context(base, next(iter(model.peft_config.values())).base_model_name_or_path):
            base.save_pretrained(folder)
        return
    model.save_pretrained(folder, state_dict=state, max_shard_size=SHARD)
    config = json.loads((folder / "config.json").read_bytes())
    config["dtype"] = str(dtype).removeprefix("torch.")
    _write_bytes(folder / "config.json", json.dumps(config, indent=2).encode() + b"\n")


def _same_context(config, folder: str) -> bool:
    """Whether a model's positions are still those of the folder it was loaded from."""
    from transformers import AutoConfig

    try:
        original = AutoConfig.from_pretrained(folder)
    except OSError:
        return False
    fields = ("max_position_embeddings", "rope_parameters")
    return all(
        getattr(original.get_text_config(), f, None) == getattr(config.get_text_config(), f, None) for f in fields
    )


# ---- the disk --------------------------------------------------------------------------------------------------------


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _fsync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle for it; NTFS journals the names
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rename(source: Path, target: Path) -> None:
    os.replace(source, target)


def _remove(path: Path) -> None:
    """Removes a file or a folder; one that is not there is fine."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _make_folder(folder: Path) -> None:
    """Creates a folder and makes its name durable in its parent."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _fsync(folder.parent)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
