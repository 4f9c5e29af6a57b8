"""`longtrace COMMAND [--config FILE.yaml] [flags]`: one dataclass per command, parsed by tyro; flags win over the file.

Exit codes: 0 done, 1 failed, 2 refused input or arguments, 143 after SIGTERM with the state saved.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from pathlib import Path

# command: (module, config class, function, what it does); modules load only when their command runs
COMMANDS = {
    "demo": (
        ".demo",
        "DemoConfig",
        "demo",
        "train a tiny reasoning model from nothing, in minutes, and see what traces buy",
    ),
    "doctor": (
        ".doctor",
        "DoctorConfig",
        "doctor",
        "versions, processor, which backend serves each op, and a self-check",
    ),
    "prepare": (".prepare", "PrepareConfig", "prepare", "audit traces: what would be lost, what would be learned"),
    "sample": (".sample", "SampleConfig", "sample", "rejection sampling: a model's right answers as rows to train on"),
    "sft": (".train", "SFTConfig", "sft", "fine-tune a model on packed traces"),
    "grpo": (".grpo", "GRPOConfig", "grpo", "reinforcement learning on problems whose answers can be checked"),
    "pairs": (".pairs", "PairsConfig", "pairs", "preference pairs: a model's best answers against its worst"),
    "prefer": (".prefer", "PreferConfig", "prefer", "preference optimisation on pairs: DPO, SimPO, BVPO"),
    "evaluate": (".evaluate", "EvaluateConfig", "evaluate", "solved rate of a model on problems, by generation"),
    "generate": (".generate", "GenerateConfig", "generate", "answer a prompt with a trained folder"),
    "export": (".export", "ExportConfig", "export", "one Hugging Face folder from a run or checkpoint (merges LoRA)"),
    "bench": ("longtrace.bench", "BenchConfig", "bench", "time this trainer against its peers"),
}


def parse(name: str, config_class: type, arguments: list[str]):
    """The command's dataclass from `--config FILE` (if given) and flags. Raises Refusal; tyro exits with 2 on bad flags."""
    import tyro

    from .config import Refusal, read_yaml

    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise Refusal("--config needs a YAML file")
        fields = read_yaml(Path(arguments[at + 1]), config_class)
        arguments = arguments[:at] + arguments[at + 2 :]
        given = {
            a.split("=")[0].lstrip("-").removeprefix("no-").replace("-", "_") for a in arguments if a.startswith("--")
        }
        for key, others in getattr(
            config_class, "FOLLOWS", {}
        ).items():  # what the file resolved for another value of key
            if key in given and _value(arguments, key) != str(fields.get(key)):
                fields = {name: value for name, value in fields.items() if name not in others}
        # the file's values become flags too, so both are checked by the same parser
        for key in fields.keys() - given:
            arguments = [*arguments, *as_flag(key, fields[key])]
    return tyro.cli(config_class, args=arguments, prog=f"longtrace {name}", description=config_class.__doc__)


def as_flag(key: str, value) -> list[str]:
    """["--key", "value"] the way tyro reads it: booleans as --key or --no-key, lists as several values."""
    flag = "--" + key.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    return [flag, *map(str, value)] if isinstance(value, list) else [flag, str(value)]


def _value(arguments: list[str], key: str) -> str:
    """What the flags say for a key that takes one value."""
    flags = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--") else [a])]
    at = [i for i, flag in enumerate(flags[:-1]) if flag.lstrip("-").replace("-", "_") == key and flag.startswith("--")]
    return flags[at[-1] + 1] if at else ""


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {entry[3]}" for name, entry in COMMANDS.items())
    return f"usage: longtrace COMMAND [--config FILE.yaml] [flags]\n\n{lines}\n\n`longtrace COMMAND --help` lists a command's flags.\n"


def main(arguments: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"longtrace {version('longtrace')}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        print(f"longtrace: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a redirected console of Windows cannot write a bar or a dash
            stream.reconfigure(errors="replace", **({"encoding": "utf-8"} if os.name == "nt" else {}))
    for chatty in ("torchao", "torch.utils._pytree"):  # what they say on import is no news to a user
        logging.getLogger(chatty).setLevel(logging.ERROR)
    from .config import NonFinite, Refusal

    try:
        module, config_class, function, _ = COMMANDS[name]
        module = importlib.import_module(module, package=__package__)
        config = parse(name, getattr(module, config_class), arguments[1:])
        _quiet_transformers()
        getattr(module, function)(config)
    except Refusal as refusal:
        print(f"longtrace {name}: {refusal}", file=sys.stderr)
        return 2
    except ValueError as error:
        from longtrace.kernels.backend import BackendRefused

        if not isinstance(error, BackendRefused):
            raise
        print(f"longtrace {name}: {error}", file=sys.stderr)
        return 2
    except (OSError, NonFinite) as error:
        print(f"longtrace {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nlongtrace {name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _quiet_transformers() -> None:
    """Its progress bars and hints would bury ours; errors stay."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
