"""Write checkpoints, the resume state and the final weights, in an order that survives a kill."""

from functools import partial
from typing import Any

from musicgen.weights import save_tensors
from training import output
from training.resume import resume_state
from training.session import Session
from training.writer import copied, has_room, size_of


def save_checkpoint(session: Session) -> None:
    """Write the resume state, then a checkpoint: in a thread, if memory has room for a copy.

    The resume state comes first, so that weights are never there alone: a resumed run makes the
    checkpoint of its step again.
    Raises: UserError if the disk is full, then or at the checkpoint before.
    """
    with session.saving:
        session.writer.wait()  # never two copies
        _save_checkpoint(session)


def _save_checkpoint(session: Session) -> None:
    lm, tuning = session.model.lm, session.tuning
    state = resume_state(session)
    if has_room(size_of([state, tuning.learned(lm)])):
        state = copied(state)
        with session.averaged():
            learned = copied(tuning.learned(lm))
        session.writer.submit(partial(_write, session, session.step, state, learned))
    else:
        save_tensors(session.output / output.RESUME, state)
        with session.averaged():
            _write_weights(session, session.step, tuning.learned(lm))


def save_last(session: Session) -> None:
    """Write what a finished run leaves; before it, a last checkpoint if one is due."""
    with session.saving:
        session.writer.wait()
        _save_last(session)


def _save_last(session: Session) -> None:
    config, lm, path = session.config, session.model.lm, session.output / output.RESUME
    if config.save_step and not path.exists():
        save_tensors(path, resume_state(session))
    with session.averaged():
        if config.save_step and session.step % config.save_step == 0:
            _write_weights(session, session.step, session.tuning.learned(lm))
        session.tuning.save_final(lm, session.output)
    if config.save_step:
        save_tensors(path, resume_state(session, is_finished=True))
    else:  # left by an earlier, interrupted part of this run
        path.unlink(missing_ok=True)


def _write(session: Session, step: int, state: dict[str, Any], learned: Any) -> None:
    save_tensors(session.output / output.RESUME, state)
    _write_weights(session, step, learned)


def _write_weights(session: Session, step: int, learned: Any) -> None:
    session.tuning.write(learned, output.checkpoint_path(session.final, step))
    output.prune(session.output, session.config.keep_checkpoints)
