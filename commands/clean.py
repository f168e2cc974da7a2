"""Make recordings fit for training, in a new folder: `python prepare.py clean my_music new`.

Removes vocals, cuts at silences and makes equally loud, as asked. A recording is first decoded into
a temporary file, so that hours of it need the memory of one block. The results are 24-bit flac:
exact for 16-bit and 24-bit recordings, and for 16-bit ones no larger than 16-bit flac.

Letters: C channels.
"""

import math
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyloudnorm
import soundfile as sf
import soxr
from tqdm import tqdm

import files
from commands.folder import begin
from errors import Problem, UserError, by_reason, count, first_lines
from flags.prepare import CleanConfig
from recordings import audio, captions, scan
from recordings.track import Track
from training.report import format_seconds

BLOCK_SEC = 60
STRIDES = 40  # in a block for demucs, whose segments of 7.8 s overlap by a quarter
SILENCE_SEC, MARGIN_SEC = 1.0, 0.5  # shortest silence, and how much of it stays, for decays
PEAK = 10 ** (-1 / 20)  # -1 dBFS
FLAC_CHANNELS, FLAC_RATE_HZ = 8, 655_350
RECORD = ".clean.json"  # in the new folder: the flags it was made with, and what is done


def clean(config: CleanConfig) -> bool:
    """Clean the recordings of a folder; return whether all could be cleaned.

    Raises: UserError if there are none, or the new folder can't be written.
    """
    out = Path(config.output_dir)
    files.check_outside(out, config.dataset_path, "--output_dir")
    with files.locked_folder(out, "--output_dir"):
        return _clean_all(config, out)


def _clean_all(config: CleanConfig, out: Path) -> bool:
    record = _start(config, out)
    done = record["done"]  # name -> facts
    tracks, problems = scan.find(config.dataset_path, **config.captions)
    read: Callable[[Track], Iterator[np.ndarray]] = _blocks
    if config.remove_vocals:
        read = partial(_without_vocals, _demucs(config.device))
    notes: list[str] = []
    earlier = len(done)
    if record["begun"]:
        _remove_files(out / record["begun"], config)
    cleaned = {_stem(name): name for name in done}
    for track in tqdm(tracks, unit="file", desc="cleaning"):
        try:
            facts = _facts(track)
        except OSError as error:
            problems.append(Problem(track.name, error.strerror or str(error)))
            continue
        if name := cleaned.get(_stem(track.name)):
            if name != track.name or any(done[name][fact] != facts[fact] for fact in facts):
                reason = "has changed since an earlier run cleaned it; name a new folder"
                problems.append(Problem(track.name, reason))
            continue
        record["begun"] = track.name
        files.write_json(out / RECORD, record)
        try:
            made, frames, said = _clean(track, out, config, read)
        except ValueError as error:
            problems.append(Problem(track.name, str(error)))
            continue
        except OSError as error:  # from the temporary file
            raise UserError(f"--output_dir={out}: can't be written to ({error.strerror})") from None
        notes += said
        done[track.name] = {**facts, "files": made, "frames_out": frames}
    record["begun"] = None
    files.write_json(out / RECORD, record)

    results = list(done.values())
    before, after = (
        format_seconds(sum(result[frames] / result["rate"] for result in results))
        for frames in ("frames", "frames_out")
    )
    files_out = count(sum(result["files"] for result in results), "file")
    print(f"in         {count(len(results), 'recording')}, {before} in all")
    print(f"out        {files_out}, {after}, in {out}")
    print(f"done       {', '.join(_asked(config))}")
    if earlier:
        print(f"           {earlier} of the recordings by an earlier run")
    names = {track.name for track in tracks}
    gone = [name for name in done if name not in names]
    left = f"no longer in {config.dataset_path}, but an earlier run left it in {out}"
    if notes:
        print(f"\nto know:\n{first_lines(notes)}")
    if gone:
        print(f"\n{count(len(gone), 'recording')} {left}:\n{first_lines(gone)}")
    if problems:
        print(f"\n{len(problems)} can't be used:\n{first_lines(by_reason(problems))}")
    return not problems


def _start(config: CleanConfig, out: Path) -> dict[str, Any]:
    """Return the record of a new folder, or of one that the same command was stopped in."""
    root = str(Path(config.dataset_path).resolve())
    free = {"dataset_path", "output_dir", "device"}
    if config.caption is None:  # earlier versions had no such flag; their folders go on
        free.add("caption")
    flags = {"folder": root, **config.model_dump(exclude=free)}
    new = {"flags": flags, "done": {}, "begun": None}
    return begin(out, RECORD, new, key="flags", suffixes="flac|txt|json")


def _stem(name: str) -> str:
    return name[: name.rindex(".")]


def _facts(track: Track) -> dict[str, Any]:
    """Return what differs once a recording or its caption has changed."""
    return {
        "rate": track.sample_rate,
        "frames": track.frames,
        "stamp": track.stamp(),
        "caption": [track.written.description, *track.written.fields] if track.written else None,
    }


def _remove_files(target: Path, config: CleanConfig) -> None:
    """Remove what a killed run made of a recording; there may be fewer pieces now."""
    number = r"_\d{3,}" if config.split_silences else ""
    made = re.compile(rf"{re.escape(target.stem)}{number}\.(flac|txt|json)")
    for path in list(target.parent.glob("*")):
        if made.fullmatch(path.name):
            path.unlink()


def _asked(config: CleanConfig) -> Iterator[str]:
    if config.remove_vocals:
        yield "vocals removed"
    if config.split_silences:
        yield f"cut at silences below {config.silence_db:g} dB"
    if config.loudness is not None:
        yield f"brought to {config.loudness:g} LUFS"


def _clean(
    track: Track, out: Path, config: CleanConfig, read: Callable[[Track], Iterator[np.ndarray]]
) -> tuple[int, int, list[str]]:
    """Clean a recording -> the number of files written, of frames in them, and notes to print.

    Raises: ValueError if the recording can't be used; OSError, UserError if the disk is full.
    """
    rate, channels = track.sample_rate, 0
    beside = captions.files(track.source, track.written) if track.written else {}
    with tempfile.TemporaryFile(dir=out) as file:
        for block in read(track):
            file.write(block.tobytes())
            channels = block.shape[1]
        file.flush()
        wav = np.memmap(file, np.float32, "r").reshape(-1, channels)
        pieces = _pieces(wav, rate, config) if config.split_silences else [(0, len(wav))]
        if not pieces:
            raise ValueError("silent from start to end")
        notes = []
        target = out / track.name
        target.parent.mkdir(parents=True, exist_ok=True)
        for number, (start, stop) in enumerate(pieces, start=1):
            end = f"_{number:03d}.flac" if config.split_silences else ".flac"
            path = target.with_name(target.stem + end)
            piece = wav[start:stop]
            gain, note = _gain(piece, rate, config.loudness)
            if note:
                notes.append(f"{path.relative_to(out).as_posix()}: {note}")
            for suffix, content in beside.items():
                files.write_bytes(path.with_suffix(suffix), content)
            files.write(path, partial(_write, wav=piece, rate=rate, gain=gain))
    return len(pieces), sum(stop - start for start, stop in pieces), notes


def _blocks(track: Track) -> Iterator[np.ndarray]:  # [frames, C]
    """Read a recording in blocks."""
    rate, channels = track.sample_rate, _channels(track)
    for start in range(0, track.frames, BLOCK_SEC * rate):
        frames = min(BLOCK_SEC * rate, track.frames - start)
        yield audio.read_crop(track.source, start, frames, rate, channels).T


def _channels(track: Track) -> int:
    channels = audio.probe(track.source).channels
    if channels > FLAC_CHANNELS or track.sample_rate > FLAC_RATE_HZ:
        raise ValueError(f"flac can't hold {channels} channels at {track.sample_rate} Hz")
    return channels


def _demucs(device: str) -> Any:
    from musicgen.device import choose_device  # only if needed: importing audiocraft takes seconds
    from musicgen.melody import load_demucs

    return load_demucs(choose_device(device), "leave out --remove_vocals")


def _without_vocals(demucs: Any, track: Track) -> Iterator[np.ndarray]:  # [frames, C]
    """Yield the sum of the stems other than vocals, in blocks.

    Each block begins with one of demucs' own segments and is separated along with what overlaps
    it, so that the result is that of the whole recording.
    """
    import torch  # only if needed
    from demucs.apply import apply_model

    rate, channels = track.sample_rate, _channels(track)
    if channels > demucs.audio_channels:
        raise ValueError(f"has {channels} channels, but demucs takes only mono and stereo")
    stems = [i for i, name in enumerate(demucs.sources) if name != "vocals"]
    device = next(demucs.parameters()).device
    segment = round(demucs.max_allowed_segment * rate)
    block = round(0.75 * demucs.max_allowed_segment * STRIDES * rate)
    for start in range(0, track.frames, block):
        first = max(0, start - block * 2 // STRIDES)  # 2: whole frames at most sample rates
        last = min(track.frames, start + block + segment)
        wav = audio.read_crop(
            track.source, first, last - first, demucs.samplerate, demucs.audio_channels
        )
        # [1, stems, C, samples] -> [samples, C]
        heard = apply_model(
            demucs, torch.from_numpy(wav)[None], shifts=0, overlap=0.25, device=device
        )
        mix = heard[0, stems].sum(0).numpy().T
        if channels == 1:
            mix = mix.mean(axis=1, keepdims=True)
        if rate != demucs.samplerate:
            mix = soxr.resample(mix, demucs.samplerate, rate)
        mix = np.pad(mix, ((0, max(0, last - first - len(mix))), (0, 0)))  # it may round down
        yield mix[start - first : min(last, start + block) - first]


def _pieces(wav: np.ndarray, rate: int, config: CleanConfig) -> list[tuple[int, int]]:
    """Return (start, stop) of what lies between silences, in frames; join short pieces."""
    hop = rate // 20  # 50 ms
    levels = []  # mean square of each hop, in the loudest channel
    for start in range(0, len(wav), BLOCK_SEC * 20 * hop):
        power = np.square(wav[start : start + BLOCK_SEC * 20 * hop], dtype=np.float64)
        levels.append(np.add.reduceat(power, np.arange(0, len(power), hop)).max(axis=1) / hop)
    heard = np.flatnonzero(np.concatenate(levels) >= 10 ** (config.silence_db / 10))
    if not len(heard):
        return []
    cuts = np.flatnonzero((np.diff(heard) - 1) * hop >= SILENCE_SEC * rate)
    margin, short = int(MARGIN_SEC * rate), config.piece_sec * rate
    firsts, lasts = heard[[0, *(cuts + 1)]].tolist(), heard[[*cuts, -1]].tolist()
    pieces: list[tuple[int, int]] = []
    for first, last in zip(firsts, lasts, strict=True):
        start, stop = max(0, first * hop - margin), min(len(wav), (last + 1) * hop + margin)
        if pieces and pieces[-1][1] - pieces[-1][0] < short and start - pieces[-1][1] < short:
            start = pieces.pop()[0]
        pieces.append((start, stop))
    return pieces


def _gain(wav: np.ndarray, rate: int, loudness: float | None) -> tuple[float, str]:
    """Return a factor and a note about it. Raises: ValueError if there are too many channels."""
    gain, ceiling, note = 1.0, 1.0, ""
    if loudness is not None:
        measured, ceiling = _loudness(wav, rate), PEAK
        if math.isinf(measured):
            return gain, "too quiet to measure, left as it is"
        gain = 10 ** ((loudness - measured) / 20)
    size = BLOCK_SEC * rate
    peak = max(float(np.abs(wav[i : i + size]).max()) for i in range(0, len(wav), size))
    if gain * peak > ceiling:
        less = 20 * math.log10(gain * peak / ceiling)
        gain, note = ceiling / peak, f"{less:.1f} dB quieter than asked: its peak would clip"
    return gain, note


def _loudness(wav: np.ndarray, rate: int) -> float:
    """Return integrated loudness in LUFS (ITU-R BS.1770-4); -inf below its absolute gate.

    pyloudnorm measures blocks that begin 1 s early, so that its filters settle; all are gated
    together.
    """
    meter, levels = pyloudnorm.Meter(rate), []
    for start in range(0, len(wav), BLOCK_SEC * rate):
        early = min(start, rate)
        block = wav[start - early : start + BLOCK_SEC * rate + 3 * rate // 10].astype(np.float64)
        if block.shape[1] == 6:  # 5.1
            block = np.delete(block, 3, axis=1)  # the low-frequency channel doesn't count
        meter.integrated_loudness(block)
        levels += meter.blockwise_loudness[10 * early // rate :]  # one for each 100 ms
    power = 10 ** (np.array(levels) / 10)
    power = power[power >= 10**-7]  # -70 LUFS
    power = power[power > power.mean() / 10] if len(power) else power
    return 10 * math.log10(power.mean()) if len(power) else -math.inf


def _write(file: BinaryIO, *, wav: np.ndarray, rate: int, gain: float) -> None:
    """Write and check: libsndfile closes a file silently if the disk is full. Raises: OSError."""
    try:
        kind = {"subtype": "PCM_24", "format": "FLAC"}
        with sf.SoundFile(file.name, "w", rate, wav.shape[1], **kind) as flac:
            for start in range(0, len(wav), BLOCK_SEC * rate):
                # As integers: libsndfile's own conversion from float is not exact.
                pcm = np.rint(wav[start : start + BLOCK_SEC * rate] * np.float32(gain * 2**23))
                flac.write(np.clip(pcm, -(2**23), 2**23 - 1).astype(np.int32) << 8)
        with sf.SoundFile(file.name) as flac:
            is_whole = flac.frames == len(wav) and flac.seek(-1, sf.SEEK_END) == len(wav) - 1
            is_whole = is_whole and len(flac.read(1)) == 1
    except sf.SoundFileError:
        is_whole = False
    if not is_whole:
        raise OSError("is the disk full?")
