"""Report a run to a person: lines on the screen, metrics.jsonl, training.png, wandb."""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import files
from errors import UserError
from flags.run import Config
from training.output import METRICS, PICTURE

DRAW_EVERY_SEC = 30.0
DRAW_SHARE = 0.01  # of the time, at most, is spent on pictures


class Report:
    """The report of a run, kept by its first process. A row is a dict with the key `step`.

    Args:
        last_step: drop the rows after this step, which a run made after its last resume state;
            they will be made again. None = keep nothing.
        wandb_run: the result of `start_wandb`, if --use_wandb is set.
    """

    def __init__(self, folder: Path, last_step: int | None, wandb_run: Any = None) -> None:
        self.folder = folder
        self.path = folder / METRICS
        self.rows: list[dict[str, Any]] = []
        if last_step is not None:
            self.rows = [row for row in read_rows(self.path) if _is_before(row, last_step)]
        self._write_rows()
        self._lacks_rows = False
        self._file = self.path.open("a", encoding="utf-8")
        self._next_draw = 0.0
        self._wandb = wandb_run

    def _write_rows(self) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        files.write(self.path, lambda file: file.write(lines.encode()))

    @property
    def wandb_id(self) -> str | None:
        return self._wandb.id if self._wandb else None

    def log(self, row: dict[str, Any], line: str) -> None:
        """Write a row to the screen, to metrics.jsonl and to wandb. Raises: UserError."""
        print(line, flush=True)
        self.rows.append(row)
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            self._lacks_rows = True
            raise UserError(f"{self.path}: can't be written ({error})") from error
        if self._wandb:
            self._wandb.log(_flat(row), step=row["step"])
        if time.monotonic() >= self._next_draw:
            self.draw()

    def log_sample(self, step: int, path: Path, prompt: str) -> None:
        print(f"sample {path}: {prompt}", flush=True)
        if self._wandb:
            import wandb

            audio = wandb.Audio(str(path), caption=prompt)
            self._wandb.log({f"samples/{path.stem.split('_', 2)[-1]}": audio}, step=step)

    def draw(self) -> None:
        """Update training.png; only warn if it can't be written."""
        start = time.monotonic()
        figure = plot(self.rows)
        try:
            files.write(self.folder / PICTURE, lambda file: figure.savefig(file, format="png"))
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
        took = time.monotonic() - start
        self._next_draw = time.monotonic() + max(DRAW_EVERY_SEC, took / DRAW_SHARE)

    def close(self, *, failed: bool) -> None:
        if self.rows:
            self.draw()
        with contextlib.suppress(OSError):  # a row that could not be written
            self._file.close()
        if self._lacks_rows:
            with contextlib.suppress(UserError):
                self._write_rows()
        if self._wandb:
            self._wandb.finish(exit_code=int(failed))


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without `step` and with a key for each codebook: wandb draws no lists."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, list):
            flat |= {f"{key}/{k}": number for k, number in enumerate(value)}
        elif key != "step":
            flat[key] = value
    return flat


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl, except a last line that a kill cut off."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _is_before(row: dict[str, Any], step: int) -> bool:
    """Return whether a run resumed after `step` steps will not make this row again."""
    return row["step"] <= step if "loss" in row else row["step"] < step


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Plot losses above and the learning rate below, over steps."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    trained = [row for row in rows if "loss" in row]
    validated = [row for row in rows if "valid_loss" in row]
    steps = [row["step"] for row in trained]
    losses = [row["loss"] for row in trained]
    loss.plot(steps, losses, color="tab:blue", alpha=0.35, label="training, each step")
    loss.plot(steps, _smooth(losses), color="tab:blue", label="training, smoothed")
    if validated:
        at = [row["step"] for row in validated]
        loss.plot(at, [r["valid_loss"] for r in validated], "o-", color="tab:red", label="held out")
        for k in range(len(validated[0]["valid_loss_codebooks"])):
            loss.plot(
                at,
                [row["valid_loss_codebooks"][k] for row in validated],
                ":",
                color="tab:red",
                alpha=0.5,
                label="held out, each codebook" if k == 0 else None,
            )
    loss.set_ylabel("cross entropy (nats per token)")
    loss.grid(alpha=0.3)
    loss.legend()
    rate.plot(steps, [row["lr"] for row in trained], color="tab:green")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("optimizer step")
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    rate.grid(alpha=0.3)
    return figure


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Return the exponential moving average, starting at the first value."""
    out: list[float] = []
    for n, value in enumerate(values):
        w = min(weight, n / (n + 1))
        out.append(w * out[-1] + (1 - w) * value if out else value)
    return out


def start_wandb(config: Config, facts: dict[str, Any], run_id: str | None) -> Any:
    """Start a wandb run or continue `run_id`. Raises: UserError if wandb can't start."""
    import wandb  # only if asked for: it starts a process and wants an account

    try:
        return wandb.init(
            project=config.wandb_project,
            name=config.wandb_name,
            dir=config.output_dir,
            config={**config.model_dump(), **facts},
            id=run_id,
            resume="allow" if run_id else None,
        )
    except wandb.Error as error:
        raise UserError(
            f"--use_wandb=1: wandb could not start ({error}); run `wandb login` once, or set "
            "WANDB_MODE=offline, or leave the flag out"
        ) from None


def format_seconds(seconds: float) -> str:
    """Format a duration. Example: 3725 -> '1:02:05'."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def train_line(row: dict[str, Any], total: int, eta_sec: float) -> str:
    norm = "skipped" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
    return (
        f"step {row['step']}/{total}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  grad {norm}  "
        f"{row['ms']:.0f} ms  {row['clips_per_sec']:.2f} clips/s  eta {format_seconds(eta_sec)}"
    )


def valid_line(row: dict[str, Any], total: int) -> str:
    codebooks = " ".join(f"{loss:.3f}" for loss in row["valid_loss_codebooks"])
    return (
        f"step {row['step']}/{total}  held-out loss {row['valid_loss']:.4f}  perplexity "
        f"{row['valid_perplexity']:.1f}  codebooks {codebooks}"
    )
