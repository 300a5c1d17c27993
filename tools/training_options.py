"""Options of `zoo finetune` that say how a stage runs and what is measured meanwhile."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tools.options import option

if TYPE_CHECKING:
    from tools.training.checks import CheckOptions
    from tools.training.trainer import Loop

_RUNNING, _CHECKS = "Running", "Checks"


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """None of it changes what is computed."""

    rows: Annotated[
        int | None,
        option(_RUNNING, "Rows that a process computes at a time.", default="all of its batch"),
    ] = None
    compile: Annotated[
        bool | None,
        option(
            _RUNNING,
            "Compile blocks and losses.",
            "--compile/--no-compile",
            default="on a GPU only",
        ),
    ] = None
    checkpointing: Annotated[
        bool, option(_RUNNING, "Compute blocks again in the backward pass: less memory.")
    ] = False
    parallel: Annotated[
        Literal["auto", "ddp", "fsdp"],
        option(
            _RUNNING,
            "Of several processes: ddp has all of the model in each and averages gradients, fsdp "
            "shards parameters (FSDP2) but where attention_mse counts, auto shards large models.",
        ),
    ] = "auto"
    save_every: Annotated[
        int,
        option(_RUNNING, "Steps between checkpoints, and one behind the last step; 0: none."),
    ] = 200
    spike: Annotated[
        float,
        option(
            _RUNNING,
            "Stop where the gradient's norm is so many times its usual size; 0: only where it is "
            "no number.",
        ),
    ] = 20.0
    tensorboard: Annotated[bool, option(_RUNNING, "Write TensorBoard's events too.")] = False

    def loop(self, device: str | None, check_every: int) -> "Loop":
        """As the trainer takes it.

        Raises:
            ValueError: a number out of range.
        """
        import torch

        from tools.training.trainer import Loop

        for name in ("save_every", "spike"):
            if not getattr(self, name) >= 0:  # nor NaN
                option_name = "--" + name.replace("_", "-")
                raise ValueError(f"{option_name} must not be negative: {getattr(self, name)}")
        on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
        return Loop(
            rows=self.rows,
            compile=on_gpu if self.compile is None else self.compile,
            checkpointing=self.checkpointing,
            parallel=self.parallel,
            save_every=self.save_every,
            check_every=check_every,
            spike=self.spike,
        )


@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """What is measured every so many steps, and at the end of a stage."""

    check_every: Annotated[int, option(_CHECKS, "Steps between checks; 0: none.")] = 0
    check_text: Annotated[
        Path | None,
        option(_CHECKS, "Text whose perplexity is measured; held out, if it is to tell."),
    ] = None
    check_hay: Annotated[Path | None, option(_CHECKS, "Prose in which passkeys are hidden.")] = (
        None
    )
    check_context: Annotated[int, option(_CHECKS, "Tokens of a window or prompt.")] = 2048
    check_windows: Annotated[int, option(_CHECKS, "Windows of the text.")] = 8
    check_prompts: Annotated[int, option(_CHECKS, "Passkey prompts, over all wordings.")] = 32

    def checks(self) -> "CheckOptions | None":
        """As the trainer takes them; None if there are none.

        Raises:
            ValueError: a check of nothing.
        """
        from tools.training.checks import CheckOptions

        texts = (self.check_text, self.check_hay)
        if not self.check_every:
            if texts != (None, None):
                raise ValueError("--check-every says how often --check-text and --check-hay count")
            return None
        if self.check_every < 0:
            raise ValueError(f"--check-every must be at least 0, not {self.check_every}")
        if texts == (None, None):
            raise ValueError("--check-every needs --check-text, --check-hay or both")
        return CheckOptions(
            text=self.check_text,
            windows=self.check_windows,
            context=self.check_context,
            hay=self.check_hay,
            prompts=self.check_prompts,
        )
