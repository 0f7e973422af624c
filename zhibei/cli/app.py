"""The command `zhibei`: which verbs exist, and what every error becomes. Knows no verb's work and imports none early.

A verb lives in `zhibei/cli/<file>.py` as a function of its own name (`zhibei.cli.train:resume`), or, for a verb with
verbs of its own, as a cyclopts App called `app` (`zhibei.cli.data:app`, App(name="data")). Its docstring is its help:
one line of purpose, a blank line, then examples (in an App's own help headed "For example:", because cyclopts takes
"Examples:" there for a section and drops it). It returns None or an exit code, prints results through
`console.emit`, and raises UserError. COMMANDS below is the whole registry.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from cyclopts import App, CycloptsError, Parameter

from zhibei import __version__
from zhibei.cli import console
from zhibei.config.errors import DONE, INTERRUPTED_AND_SAVED, UserError

COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": (
        "zhibei.cli.quickstart:quickstart",
        "Train a small model here in minutes, all the way to PPO, and talk to it.",
    ),
    "data": ("zhibei.cli.data:app", "Look at data before you train on it."),
    "config": (
        "zhibei.cli.config:config",
        "Show the effective run file and where each value comes from.",
    ),
    "check": ("zhibei.cli.check:check", "Find everything that is known to be wrong with a run."),
    "doctor": ("zhibei.cli.doctor:doctor", "Try what this machine can do, and say what is broken."),
    "rehearse": ("zhibei.cli.rehearse:rehearse", "Try a run for a minute."),
    "train": ("zhibei.cli.train:train", "Fine-tune a model as a run file or recipe says."),
    "run": ("zhibei.cli.run:run", "Run several stages as one file: SFT, reward model, PPO, evaluation."),
    "launch": ("zhibei.cli.launch:launch", "Train one run on several GPUs, on one node or many."),
    "resume": ("zhibei.cli.train:resume", "Go on with a run that was stopped."),
    "plan": ("zhibei.cli.plan:plan", "Say what a run will need: memory by cause and phase, disk, time and money."),
    "verify": ("zhibei.cli.verify:verify", "Prove that a run, a checkpoint, a model or an adapter folder is complete."),
    "explain": ("zhibei.cli.explain:explain", "Name the pitfall behind a log or traceback."),
    "pitfalls": ("zhibei.cli.pitfalls:pitfalls", "Read about the known pits."),
    "chat": ("zhibei.cli.chat:chat", "Talk to a trained model."),
    "serve": ("zhibei.cli.serve:serve", "Serve trained models with the API of OpenAI."),
    "web": ("zhibei.cli.web:web", "Talk to trained models in a browser."),
    "merge": ("zhibei.cli.merge:merge", "Merge adapters into their base: one complete Hugging Face folder."),
    "export": ("zhibei.cli.export:export", "Hand a model over in another form: Hugging Face, GGUF, Meta and others."),
    "parity": ("zhibei.cli.parity:parity", "Compare two models, or two forms of one."),
    "report": ("zhibei.cli.report:report", "Write the report page of a run again."),
}

# Read when torch is loaded, which is after this; what the user has set wins.
SETTINGS_OF_TORCH = {
    # Waiting threads otherwise spin; where cores are shared, a small model's step then takes ten times as long.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Packed steps differ in size; without this the GPU's free memory falls into pieces.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}

HELP = """From data to a model that speaks, with the known pits caught first."""

EPILOGUE = """Begin with:  zhibei quickstart
Or:          zhibei train alpaca-lora-7b model.path=MODEL data.sources=[FILE]
Everywhere:  --json for machines, --debug for the traceback of an error"""


def make_app(verb: str = "") -> App:
    """The command tree. Modules of verbs are imported when a verb is used; `verb` shows its own docstring as help."""
    app = App(
        name="zhibei",
        help=HELP,
        help_epilogue="" if verb in COMMANDS else EPILOGUE,
        help_format="plaintext",
        version=__version__,
        result_action="return_value",
        suppress_keyboard_interrupt=False,
        default_parameter=Parameter(negative=(), show_default=_shown_default),
    )
    for order, (name, (target, purpose)) in enumerate(COMMANDS.items()):
        app.command(target, name=name, help=None if name == verb else purpose, sort_key=order)
    return app


def _shown_default(value: object) -> object:
    """A switch that is off and an option left open need no `[default: ...]`."""
    return None if value is False or value is None or value in ("", ()) else value


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script: run and leave with the exit code of `run_command`."""
    for name, value in SETTINGS_OF_TORCH.items():
        os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that cannot show 指 still gets the message
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run_command(sys.argv[1:] if arguments is None else list(arguments)))


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line. 0 done, 1 our fault, 2 the user must act, 3 stopped by a watchdog, 130 interrupted."""
    debug = "--debug" in arguments or os.environ.get("ZHIBEI_DEBUG", "") not in ("", "0")
    as_json = "--json" in arguments
    tokens = [argument for argument in arguments if argument != "--debug"]
    try:
        result = make_app(tokens[0] if tokens else "")(tokens, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except UserError as error:
        return console.report_error(error, as_json)
    except CycloptsError as error:
        return console.report_error(_usage_error(error), as_json)
    except KeyboardInterrupt:
        console.stderr.print("interrupted")
        return INTERRUPTED_AND_SAVED
    except BrokenPipeError:  # the reader of a pipe has gone (| head): no fault of anyone
        console.drop_stdout()
        return DONE
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else DONE
    except Exception as error:
        return console.report_defect(error, debug=debug, as_json=as_json)
    return result if isinstance(result, int) and not isinstance(result, bool) else DONE


def _usage_error(error: CycloptsError) -> UserError:
    command = " ".join(["zhibei", *(error.command_chain or ())])
    return UserError(str(error), expected="a command, option or value that exists", fix=f"see  {command} --help")


if __name__ == "__main__":
    main()
