"""Good recordings in any dress are read right: formats, rates, channels, names, lengths."""

import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from dataset import Batch, Clips, Pick, collate
from recordings.audio import read_crop
from recordings.scan import scan

RATE = 32_000  # of the models


def sine(seconds: float, rate: int, gains: tuple[float, ...] = (1.0,), hz: float = 440.0):
    """[samples, channels] of one sine, amplitude 0.5 x the channel's gain."""
    t = np.arange(round(seconds * rate)) / rate
    return 0.5 * np.sin(2 * np.pi * hz * t)[:, None] * np.array(gains)


def ramp(seconds: float, rate: int) -> np.ndarray:
    """[samples]: each value is its own time in seconds, so that a crop tells where it is from."""
    return np.arange(round(seconds * rate)) / rate


def pair(folder: Path, wav: np.ndarray, rate: int, subtype: str = "PCM_16", fmt: str = "WAV"):
    folder.mkdir(parents=True, exist_ok=True)
    sf.write(folder / "a.wav", wav, rate, subtype=subtype, format=fmt)
    (folder / "a.txt").write_text("a tune")
    return folder


def clips(folder: Path, seconds: float, channels: int = 1, rate: int = RATE) -> Clips:
    samples = round(seconds * rate)
    return Clips(scan(str(folder)), sample_rate=rate, channels=channels, samples=samples, seed=0)


def assert_is_sine(wav: np.ndarray, gains: tuple[float, ...] = (1.0,), atol: float = 2e-4):
    """Frequency, level and place, to the sample; but for the ends, where a resampler rings."""
    expected = sine(wav.shape[1] / RATE, RATE, gains).T
    assert wav.shape == expected.shape
    np.testing.assert_allclose(wav[:, 500:-500], expected[:, 500:-500], atol=atol)


SUBTYPES = ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"]
RATES = [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 88_200, 96_000, 192_000]
DRESSES = [
    *((subtype, 44_100, 2, "WAV") for subtype in SUBTYPES),
    *(("PCM_16", rate, 1, "WAV") for rate in RATES),
    *(("PCM_16", 32_000, channels, "WAV") for channels in range(1, 7)),
    *(("PCM_24", 48_000, 6, fmt) for fmt in ("WAVEX", "RF64")),
]


@pytest.mark.parametrize(("subtype", "rate", "channels", "fmt"), DRESSES)
def test_any_format_gives_the_same_sound(subtype, rate, channels, fmt, tmp_path):
    gains = tuple(np.linspace(0.5, 1.5, channels) if channels > 1 else [1.0])  # their mean is 1
    folder = pair(tmp_path / "x", sine(1.0, rate, gains), rate, subtype, fmt)
    track = scan(str(folder))[0]
    assert (track.sample_rate, track.frames) == (rate, rate)

    clip = clips(folder, 1.0)[Pick(0, 0)]
    assert clip.wav.dtype == torch.float32
    assert clip.length == RATE
    assert_is_sine(clip.wav.numpy(), atol=0.012 if subtype == "PCM_U8" else 3e-4)


MAPPING = [  # channels of the file, gains, channels of the model, gains of what it hears
    (1, (1.0,), 1, (1.0,)),
    (1, (1.0,), 2, (1.0, 1.0)),
    (2, (1.0, 0.5), 1, (0.75,)),
    (2, (1.0, 0.5), 2, (1.0, 0.5)),
    (6, (1.0, 0.5, 0.0, 0.3, 0.0, 0.0), 1, (0.3,)),
    (6, (1.0, 0.5, 0.0, 0.3, 0.0, 0.0), 2, (1.0, 0.5)),
]


@pytest.mark.parametrize("rate", [RATE, 44_100])
@pytest.mark.parametrize(("of_file", "gains", "of_model", "heard"), MAPPING)
def test_channels_are_mapped(of_file, gains, of_model, heard, rate, tmp_path):
    assert len(gains) == of_file
    folder = pair(tmp_path, sine(1.0, rate, gains), rate, "FLOAT")
    wav = clips(folder, 1.0, channels=of_model)[Pick(0, 0)].wav.numpy()
    assert_is_sine(wav, heard)


def test_names_captions_and_folders(tmp_path):
    files = {  # the caption's bytes
        "take one.wav": ("take one.txt", b"slow  piano\r\nwaltz\r\n"),
        "LOUD.WAV": ("LOUD.TXT", b"loud"),
        "Bossa Nova é ü 雨.wav": ("Bossa Nova é ü 雨.txt", "chuva, é".encode()),
        "a/b c/deep.Wav": ("a/b c/deep.txt", b"\xef\xbb\xbfwith a byte order mark\n"),
        "v1.2.wav": ("v1.2.txt", b"\tdots\n\n"),
        "2024.wav": ("2024.txt", b"17"),
    }
    for name, (text, caption) in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, sine(0.6, 8_000), 8_000, format="WAV")
        (tmp_path / text).write_bytes(caption)
    ignored = [
        "._take one.wav",
        ".hidden.wav",
        "__MACOSX/._LOUD.WAV",
        "cover.jpg",
        "song.mid",
        ".hidden.mp3",
    ]
    for name in ignored:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no sound")
    (tmp_path / "folder.wav").mkdir()

    tracks = scan(str(tmp_path))
    assert {track.name: track.caption for track in tracks} == {
        "take one.wav": "slow piano waltz",
        "LOUD.WAV": "loud",
        "Bossa Nova é ü 雨.wav": "chuva, é",
        "a/b c/deep.Wav": "with a byte order mark",
        "v1.2.wav": "dots",
        "2024.wav": "17",
    }
    made = clips(tmp_path, 0.5)
    batch = collate([made[Pick(0, index)] for index in range(len(tracks))])
    assert isinstance(batch, Batch)
    assert batch.error is None
    assert batch.names == [track.name for track in tracks]


def test_captions_are_not_looked_for_when_not_wanted(tmp_path):
    folder = pair(tmp_path, sine(0.6, 8_000), 8_000)
    (folder / "a.txt").unlink()
    assert [track.caption for track in scan(str(folder), with_captions=False)] == [""]


def test_a_linked_folder_is_read_too(tmp_path):
    pair(tmp_path / "elsewhere", sine(0.6, 8_000), 8_000)
    pair(tmp_path / "music", sine(0.6, 8_000), 8_000)
    (tmp_path / "music" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert [track.name for track in scan(str(tmp_path / "music"))] == ["a.wav", "more/a.wav"]


def chunk(name: bytes, content: bytes, size: int | None = None) -> bytes:
    return name + struct.pack("<I", len(content) if size is None else size) + content


def wav_bytes(samples: np.ndarray, rate: int, *, data_size=None, riff_size=None, before=b""):
    """A 16 bit mono wav built by hand, so that its header can say anything."""
    fmt = chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, rate, 2 * rate, 2, 16))
    data = chunk(b"data", (samples * 32767).astype("<i2").tobytes(), data_size)
    return chunk(b"RIFF", b"WAVE" + before + fmt + data, riff_size)


UNKNOWN = 0xFFFFFFFF  # what ffmpeg and sox write to a pipe
STREAMED = [
    (UNKNOWN, UNKNOWN, b"", b""),
    (0x7FFFFFFF, 0x7FFFFFFF, b"", b""),
    (0x7FFFF000, 0x7FFFF024, b"", b""),
    (UNKNOWN, UNKNOWN, chunk(b"LIST", b"INFOISFT\x06\0\0\0Lavf60"), b""),
    (None, None, chunk(b"bext", bytes(602)), b""),
    (None, None, chunk(b"LIST", b"INFO"), chunk(b"id3 ", b"ID3\x04junk of a tagger")),
]


@pytest.mark.parametrize(("data_size", "riff_size", "before", "after"), STREAMED)
def test_streamed_and_tagged_wavs_keep_their_length(data_size, riff_size, before, after, tmp_path):
    made = wav_bytes(
        sine(2.0, 16_000)[:, 0], 16_000, data_size=data_size, riff_size=riff_size, before=before
    )
    (tmp_path / "a.wav").write_bytes(made + after)
    (tmp_path / "a.txt").write_text("streamed")
    assert scan(str(tmp_path))[0].frames == 32_000
    clip = clips(tmp_path, 2.0)[Pick(0, 0)]
    assert clip.length == 64_000
    assert_is_sine(clip.wav.numpy())


def test_only_the_crop_of_an_hour_is_decoded(tmp_path, monkeypatch):
    rate, seconds = 8_000, 3_600
    fmt = struct.pack("<HHIIHH", 1, 1, rate, rate, 1, 8)
    head = b"WAVE" + chunk(b"fmt ", fmt) + chunk(b"data", b"", rate * seconds)
    with (tmp_path / "a.wav").open("wb") as file:  # sparse: it takes no room on disk
        file.write(chunk(b"RIFF", head, 36 + rate * seconds))
        file.truncate(44 + rate * seconds)
    (tmp_path / "a.txt").write_text("a long silence")

    decoded = []
    read = sf.SoundFile.read

    def counting(self, *args, **kwargs):
        block = read(self, *args, **kwargs)
        decoded.append(len(block))
        return block

    monkeypatch.setattr(sf.SoundFile, "read", counting)
    made = clips(tmp_path, 2.0)
    assert made.tracks[0].duration_sec == seconds
    assert sum(decoded) <= 1  # the last frame, to see that it is there
    decoded.clear()
    for epoch in range(5):
        assert made[Pick(epoch, 0)].length == 2 * RATE
    assert decoded == [2 * rate] * 5


def test_a_clip_of_exactly_the_duration_is_taken_whole(tmp_path):
    for rate in (RATE, 44_100, 22_050, 11_025):
        folder = pair(tmp_path / str(rate), sine(2.0, rate), rate, "FLOAT")
        made = clips(folder, 2.0)
        assert {made[Pick(epoch, 0)].length for epoch in range(3)} == {2 * RATE}
        assert_is_sine(made[Pick(0, 0)].wav.numpy())


@pytest.mark.parametrize("rate", [RATE, 44_100, 11_025])
def test_a_shorter_clip_is_padded_and_says_so(rate, tmp_path):
    folder = pair(tmp_path, sine(1.3, rate) + 0.1, rate, "FLOAT")
    clip = clips(folder, 3.0)[Pick(5, 0)]
    assert abs(clip.length - 1.3 * RATE) <= 1
    wav = clip.wav.numpy()[0]
    assert len(wav) == 3 * RATE
    assert not wav[clip.length :].any()
    expected = sine(1.3, RATE)[:, 0] + 0.1
    np.testing.assert_allclose(wav[500:41_000], expected[500:41_000], atol=1e-3)
    assert np.abs(wav[clip.length - 500 : clip.length]).mean() > 0.1


@pytest.mark.parametrize("rate", [RATE, 44_100, 8_000, 96_000])
@pytest.mark.parametrize("start", [0, 12_345])
def test_a_crop_comes_from_its_place(rate, start, tmp_path):
    path = pair(tmp_path, ramp(5.0, rate), rate, "DOUBLE") / "a.wav"
    wav = read_crop(path, start, 2 * rate, RATE, 1)[0]
    expected = start / rate + np.arange(len(wav)) / RATE
    assert len(wav) == 2 * RATE
    inner = slice(1_000, -1_000)  # the filter rings where the crop begins and ends
    offset = (wav[inner] - expected[inner]) * RATE  # in samples
    assert np.abs(offset).max() < 0.25


def test_crops_come_from_all_over_the_file(tmp_path):
    folder = pair(tmp_path, ramp(20.0, 44_100), 44_100, "FLOAT")
    made = clips(folder, 1.0)
    middles = np.array([made[Pick(epoch, 0)].wav[0, RATE // 2] for epoch in range(300)]) - 0.5
    assert middles.min() < 0.5
    assert middles.max() > 18.5
    counts, _ = np.histogram(middles, bins=10, range=(0, 19))
    assert counts.min() > 12, counts  # 30 expected
    assert len(set(middles)) > 290


def test_a_file_one_frame_too_long_is_still_cropped(tmp_path, monkeypatch):
    folder = pair(tmp_path, [*ramp(1.0, 8_000), 1.0], 8_000, "FLOAT")
    starts = []
    monkeypatch.setattr(
        "recordings.audio.read_crop",
        lambda path, start, *rest: starts.append(start) or read_crop(path, start, *rest),
    )
    made = clips(folder, 1.0)
    assert {made[Pick(epoch, 0)].length for epoch in range(40)} == {RATE}
    assert set(starts) == {0, 1}  # both places are reached, and none beyond


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 192_000])
def test_a_file_that_is_long_enough_fills_the_crop(rate, tmp_path):
    folder = pair(tmp_path, ramp(3.0, rate), rate, "FLOAT")
    for frames in (37, 50, 101, 149):  # of tokens, 20 ms each: seldom whole frames of the file
        made = clips(folder, frames / 50)
        assert {made[Pick(epoch, 0)].length for epoch in range(3)} == {frames * 640}
