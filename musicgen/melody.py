"""The melody of melody models: the strongest of 12 pitch classes, several times a second (chroma).

audiocraft computes it after demucs has removed drums and bass. Here that is done once for each
recording and kept in the user's cache folder, so that training itself runs no demucs.

Letters: B batch, C channels, F chroma frames (of 4096 samples, at 32 kHz 0.128 s), P pitch classes.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from audiocraft.models.lm import LMModel
from audiocraft.modules.chroma import ChromaExtractor
from audiocraft.modules.conditioners import (
    ChromaStemConditioner,
    WaveformConditioner,
)

from errors import UserError, is_out_of_memory
from musicgen.device import codec_device, without_tf32
from recordings import audio
from recordings.cache import Cache
from recordings.melodies import Melodies
from recordings.track import Track

BLOCK_SEC, MARGIN_SEC = 120, 4  # separated at a time, and the context on each side


class MelodyConditioner(ChromaStemConditioner):
    """audiocraft's conditioner, as `MusicGen.get_pretrained` sets it up for generation.

    A melody is repeated or cut to the model's window, `chroma_len` frames. No melody is the chroma
    of silence (audiocraft trains with zeros, which generation never produces). Unlike audiocraft's,
    it imports and loads demucs only for the first recording.
    """

    def __init__(
        self,
        output_dim: int,
        sample_rate: int,
        n_chroma: int,
        radix2_exp: int,
        duration: float,
        device: Any = "cpu",
        argmax: bool = False,
        **_: Any,  # for audiocraft's evaluation and cache
    ) -> None:
        WaveformConditioner.__init__(self, n_chroma, output_dim, device)
        self.autocast = torch.autocast(torch.device(device).type, enabled=False)  # type: ignore
        self.sample_rate = sample_rate
        self.duration = duration
        self.match_len_on_eval = True
        self._use_masking = False
        self.chroma = ChromaExtractor(
            sample_rate, n_chroma=n_chroma, radix2_exp=radix2_exp, argmax=argmax
        ).to(device)
        self.chroma_len = self._get_chroma_len()
        self.eval_wavs = self.cache = None

    @functools.cached_property
    def demucs(self) -> Any:
        """Load htdemucs on first use."""
        return load_demucs(self.device, "train with --drop_melody=1, on captions alone")

    @torch.no_grad()
    def _get_stemmed_wav(self, wav: torch.Tensor, sample_rate: int) -> torch.Tensor:
        """Remove drums and bass: wav `[B, C, samples]` -> `[B, 1, samples]`.

        Unlike audiocraft's, this has no random shifts, so the result is always the same, and
        separates equal wavs once: in generation audiocraft repeats one for each variation.
        """
        wav, places = wav.unique(dim=0, return_inverse=True)
        demucs = self.demucs
        from demucs.apply import apply_model
        from demucs.audio import convert_audio

        leading = [demucs.sources.index(name) for name in ("vocals", "other")]
        with self.autocast, without_tf32():
            device = codec_device(self.device)
            wav = wav.to(device)
            wav = convert_audio(wav, sample_rate, demucs.samplerate, demucs.audio_channels)
            stems = apply_model(demucs, wav, shifts=0, device=device)  # [B, stems, C, samples]
            mix = stems[:, leading].sum(1)
            mix = convert_audio(mix, demucs.samplerate, self.sample_rate, 1)
            return mix.to(self.device)[places]

    @torch.no_grad()
    def none(self) -> torch.Tensor:
        """Return what stands for no melody, `[chroma_len, P]`."""
        silence = torch.zeros(1, 1, device=self.device)
        return self._extract_chroma(silence)[0, :1].expand(self.chroma_len, -1)


def melody_conditioner(lm: LMModel) -> MelodyConditioner | None:
    """Return a melody model's conditioner, or None for other models."""
    conditioners = lm.condition_provider.conditioners.values()
    return next((c for c in conditioners if isinstance(c, MelodyConditioner)), None)


def load_demucs(device: torch.device | str, without: str) -> Any:
    """Load htdemucs, for `demucs.apply.apply_model`.

    Raises: UserError if it is not available; `without` says how to do without.
    """
    try:
        from demucs.hf import get_hf_model
    except ImportError:
        raise UserError(
            f'demucs is not installed: pip install "demucs>=4.1"; or {without}'
        ) from None
    try:
        demucs = get_hf_model("htdemucs")
    except Exception as error:  # offline, no space, no access: each its own class
        if is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines() or ["no reason given"]
        raise UserError(
            "demucs' weights (adefossez/HTDemucs) are not in the Hugging Face cache and could "
            f"not be downloaded ({type(error).__name__}: {lines[0]}): connect to the network "
            f"once, or {without}"
        ) from None
    return demucs.to(codec_device(device)).eval()


def melodies_of(conditioner: MelodyConditioner) -> Melodies:
    """Return a reader of melodies in the format of a melody model."""
    chroma = conditioner.chroma
    settings = [conditioner.sample_rate, chroma.winlen, chroma.n_chroma, chroma.argmax]
    return Melodies(
        frames=conditioner.chroma_len,
        rate=conditioner.sample_rate / chroma.winhop,
        none=conditioner.none().cpu().numpy(),
        cache=Cache("melodies", ["htdemucs", *settings]),
    )


def fill(
    conditioner: MelodyConditioner,
    melodies: Melodies,
    tracks: list[Track],
    *,
    rank: int = 0,
    processes: int = 1,
) -> None:
    """Find the melodies that are not in the cache yet, then free demucs.

    Raises: UserError if a recording can't be read or demucs is not available.
    """

    def find(track: Track) -> np.ndarray:
        return np.concatenate(list(_blocks(conditioner, track))).astype(np.float16)

    melodies.cache.fill(tracks, find, rank=rank, processes=processes)
    conditioner.__dict__.pop("demucs", None)


def _blocks(conditioner: MelodyConditioner, track: Track) -> Iterator[np.ndarray]:
    """Yield the chroma `[F, P]` of a whole recording in blocks, so that memory is bounded."""
    rate, hop = conditioner.sample_rate, conditioner.chroma.winhop
    frames = 1 + int(track.duration_sec * rate) // hop
    block, margin = BLOCK_SEC * rate // hop, MARGIN_SEC * rate // hop
    for start in range(0, frames, block):
        first = max(0, start - margin)
        begin = first * hop * track.sample_rate // rate  # in the file's own frames
        end = (start + block + margin) * hop * track.sample_rate // rate
        end = min(track.frames, end)
        wav = audio.read_crop(track.source, begin, end - begin, rate, 1)  # [1, samples]
        on_device = torch.from_numpy(wav)[None].to(conditioner.device)  # [1, 1, samples]
        chroma = conditioner._compute_wav_embedding(on_device, rate)[0]
        yield chroma[start - first :][:block].cpu().numpy()
