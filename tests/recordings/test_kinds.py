"""Recordings as people have them: headers that are wrong or missing, ends that are missing."""

import shutil
import struct
from functools import partial
from pathlib import Path

import av
import kinds
import numpy as np
import pytest
import soundfile as sf
from conftest import metrics, tone
from samples import FORMATS, RATE, write, write_with_pyav

import prepare
from errors import UserError
from recordings import audio
from recordings.audio import read_crop
from recordings.scan import scan
from recordings.track import Track

scan_only = partial(scan, with_captions=False)


def only(folder: Path) -> Track:
    (track,) = scan_only(str(folder))
    return track


def decoded(path: Path) -> np.ndarray:
    """[C, samples]: the whole file by PyAV, in one go."""
    with av.open(str(path)) as file:
        as_float = av.AudioResampler(format="fltp")
        blocks = (part for block in file.decode(audio=0) for part in as_float.resample(block))
        return np.concatenate([part.to_ndarray() for part in blocks], axis=1)


def assert_crops_are_of(whole: np.ndarray, track: Track, atol: float, count: int = 60) -> None:
    rng = np.random.default_rng(0)
    channels, frames = whole.shape
    for start in [0, frames - 2_000, *rng.integers(frames - 2_000, size=count)]:
        crop = read_crop(track.source, int(start), 2_000, track.sample_rate, channels)
        there = whole[:, start : start + 2_000]
        np.testing.assert_allclose(crop, there, atol=atol, err_msg=f"{start}")


def put_mp3(path: Path, seconds: float, header: bool, seed: int = 0) -> None:
    """An mp3 of a variable bit rate: low at first, high after 2 s."""
    wav = tone(seed, seconds, 44_100)
    wav[: 2 * 44_100] *= 0.001
    coding = {"flags": "+qscale", "global_quality": str(4 * 118)}  # of FF_QP2LAMBDA
    write_with_pyav(
        path, wav, "mp3", "libmp3lame", coding, rate=44_100, write_xing=str(int(header))
    )


def packets(path: Path) -> list[int]:
    """Return the position of each packet."""
    with av.open(str(path)) as file:
        return [packet.pos for packet in file.demux(audio=0) if packet.size]


# Mp3.


@pytest.mark.parametrize("header", [True, False])
def test_an_mp3_is_as_long_as_its_frames_and_its_crops_are_exact(header, tmp_path):
    put_mp3(tmp_path / "a.mp3", 12.0, header)
    track = only(tmp_path)
    assert abs(track.duration_sec - 12) < 0.1
    whole = decoded(tmp_path / "a.mp3")
    assert whole.shape[1] == track.frames
    assert_crops_are_of(whole, track, atol=1e-5)


def test_an_mp3_is_cut_if_its_header_promises_over_a_second_more(tmp_path):
    put_mp3(tmp_path / "a.mp3", 12.0, header=True)
    content, at = (tmp_path / "a.mp3").read_bytes(), packets(tmp_path / "a.mp3")
    (tmp_path / "a.mp3").write_bytes(content[: at[-30]])
    track = only(tmp_path)
    assert track.ends_early
    assert 11 < track.duration_sec < 11.3
    assert_crops_are_of(decoded(tmp_path / "a.mp3")[:, : track.frames], track, atol=1e-5, count=9)
    (tmp_path / "a.mp3").write_bytes(content[: at[-45]])
    with pytest.raises(UserError, match=r"a\.mp3: truncated or damaged: .* 12\.0"):
        only(tmp_path)


@pytest.mark.parametrize("header", [True, False])
def test_an_mp3_whose_last_frame_is_incomplete_is_cut(header, tmp_path):
    put_mp3(tmp_path / "a.mp3", 3.0, header)
    content = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(content + b"TAG" + bytes(125))
    assert not only(tmp_path).ends_early
    (tmp_path / "a.mp3").write_bytes(content[:-9])
    with pytest.raises(UserError, match=r"a\.mp3: truncated: its last frame is incomplete"):
        only(tmp_path)


@pytest.mark.parametrize("seed", [0, 2])  # libsndfile raises an error, or stops without one
def test_an_mp3_with_a_damaged_part_is_read_to_the_end(seed, tmp_path):
    write(tmp_path / "a.mp3", tone(0, 20.0, RATE, 2))
    content = bytearray((tmp_path / "a.mp3").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4_000] = np.random.default_rng(seed).bytes(4_000)
    (tmp_path / "a.mp3").write_bytes(content)
    track = only(tmp_path)
    assert track.duration_sec > 19
    for start in (0, track.frames // 2, track.frames - RATE):
        frames = track.frames - start
        assert read_crop(track.source, start, frames, RATE, 1).shape == (1, frames)


def test_mp3s_one_behind_the_other_are_read_to_the_end(tmp_path):
    for seed in range(2):
        put_mp3(tmp_path / f"{seed}.mp3", 5.0, header=True, seed=seed)
    parts = [(tmp_path / f"{seed}.mp3").read_bytes() for seed in range(2)]
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "a.mp3").write_bytes(b"".join(parts))
    track = only(tmp_path / "both")
    assert 10 <= track.duration_sec < 10.2
    heard = read_crop(track.source, track.frames - 60_000, 30_000, 44_100, 1)[0]
    second = read_crop(tmp_path / "1.mp3", 0, 5 * 44_100, 44_100, 1)[0]
    assert np.correlate(second, heard, "valid").max() > 0.99 * np.square(heard).sum()


def test_text_by_the_name_of_a_recording_is_told_in_our_words(tmp_path, capfd):
    for suffix in ("mp3", "wav", "aac", "mkv"):
        (tmp_path / f"{suffix} x.{suffix}").write_text("la la la " * 99)
    with pytest.raises(UserError) as caught:
        scan_only(str(tmp_path))
    assert "4 files (" in str(caught.value)
    assert "can't be read as audio (it is no recording, or damaged)" in str(caught.value)
    assert "exist" not in str(caught.value)
    assert capfd.readouterr().err == ""


# Lengths.


def test_a_flac_without_a_length_is_counted(tmp_path):
    wav = tone(0, 7.0, RATE, 2)
    write(tmp_path / "a.flac", wav)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21] &= 0xF0  # 36 bits of STREAMINFO
    content[22:26] = bytes(4)
    whole = sf.read(tmp_path / "a.flac", dtype="float32")[0].T
    (tmp_path / "a.flac").write_bytes(content)
    track = only(tmp_path)
    assert track.frames == 7 * RATE
    assert_crops_are_of(whole, track, atol=0)


def test_a_flac_in_ogg_is_read_though_libsndfile_refuses_it(tmp_path):
    write_with_pyav(tmp_path / "a.ogg", tone(0, 3.0, RATE), "ogg", "flac", {})
    with pytest.raises(sf.SoundFileError):
        sf.info(tmp_path / "a.ogg")
    track = only(tmp_path)
    assert track.frames == 3 * RATE
    assert_crops_are_of(decoded(tmp_path / "a.ogg"), track, atol=0)


def put_film(path: Path, sound_from: int, sound_to: int, seconds: int) -> None:
    """A film of `seconds` in Matroska, in which only a part has sound."""
    with av.open(str(path), "w", format="matroska") as file:
        picture = file.add_stream("mpeg4", rate=10, width=64, height=64, pix_fmt="yuv420p")
        sound = file.add_stream("flac", rate=RATE, layout="mono", format="s16")
        for tenth in range(10 * seconds):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            frame.pts = tenth
            file.mux(picture.encode(frame))
            if tenth % 10 == 0 and sound_from <= tenth // 10 < sound_to:
                wav = np.random.default_rng(tenth).integers(-9_000, 9_000, (1, RATE), np.int16)
                block = av.AudioFrame.from_ndarray(wav, format="s16", layout="mono")
                block.sample_rate, block.pts = RATE, tenth // 10 * RATE
                file.mux(sound.encode(block))
        file.mux(picture.encode(None))
        file.mux(sound.encode(None))


@pytest.mark.parametrize(("sound_from", "sound_to"), [(0, 8), (3, 12), (2, 9)])
def test_the_sound_of_a_film_may_begin_later_and_end_before_the_picture(
    sound_from, sound_to, tmp_path
):
    put_film(tmp_path / "a.mkv", sound_from, sound_to, 12)
    track = only(tmp_path)
    assert track.frames == (sound_to - sound_from) * RATE
    assert not track.ends_early
    content = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"a\.mkv: truncated or damaged"):
        only(tmp_path)


def ogg_checksum(page: bytes) -> int:
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ 0x04C11DB7 * (value >> 31)) & 0xFFFFFFFF
    return value


def put_vorbis(path: Path, seconds: float, missing: float) -> None:
    """A Vorbis file whose last page says that it is `missing` seconds longer than it is."""
    write(path, tone(0, seconds, RATE))
    content = bytearray(path.read_bytes())
    last = content.rindex(b"OggS")
    struct.pack_into("<q", content, last + 6, round((seconds + missing) * RATE))
    struct.pack_into("<I", content, last + 22, 0)
    struct.pack_into("<I", content, last + 22, ogg_checksum(content[last:]))
    path.write_bytes(content)


def test_an_end_that_is_missing_is_taken_as_it_is_if_it_is_short(tmp_path):
    write(tmp_path / "b.flac", tone(0, 20.0, RATE))
    write(tmp_path / "c.wav", tone(0, 20.0, RATE))
    write(tmp_path / "d.m4a", tone(0, 20.0, RATE))
    put_vorbis(tmp_path / "a.ogg", 20.0, 0.15)
    for name, share in {"b.flac": 0.997, "c.wav": 0.995, "d.m4a": 0.993}.items():
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: round(len(content) * share)])
    for tracks in (scan_only(str(tmp_path)), scan_only(str(tmp_path))):  # the second from the index
        assert [track.ends_early for track in tracks] == [True] * 4
        assert all(19.8 <= track.duration_sec <= 20 for track in tracks)
    assert tracks[0].frames == 20 * RATE
    for track in tracks:
        whole = read_crop(track.source, 0, track.frames, RATE, 1)
        assert_crops_are_of(whole, track, atol=1e-6, count=5)


@pytest.mark.parametrize(("seconds", "missing"), [(20.0, 0.3), (101.0, 1.005)])
def test_an_end_of_over_a_hundredth_or_a_second_is_not(seconds, missing, tmp_path):
    put_vorbis(tmp_path / "a.ogg", seconds, missing)
    with pytest.raises(UserError, match=r"a\.ogg: truncated or damaged"):
        scan_only(str(tmp_path))


def test_missing_ends_are_told_once(mono_folder, tmp_path, fit, cli, capsys):
    for number in range(5):
        put_vorbis(tmp_path / "music" / f"{number}.ogg", 6.0, 0.05 if number else 0.0)
    fit(mono_folder, tmp_path / "music", max_steps=1, caption="a tune")
    told = "less than 1 s is missing at the end of 1.ogg, 2.ogg, 3.ogg and 1 more: used as is"
    assert capsys.readouterr().out.count(told) == 1
    result = cli(
        prepare, "check", str(tmp_path / "music"), caption="a tune", picture=tmp_path / "a.png"
    )
    assert result.code == 0
    assert "4 recordings with less than 1 s missing at the end" in result.out
    assert "Training would start." in result.out


# Kinds.


def test_a_crop_of_noisy_aac_starts_where_it_should(tmp_path):
    """Its encoder replaces noise by its level, so crops are not exact."""
    wav = tone(0, 6.0, RATE) + 0.05 * np.random.default_rng(0).standard_normal((6 * RATE, 1))
    for name, form in {"a.m4a": "mp4", "b.aac": "adts", "c.mkv": "matroska"}.items():
        write_with_pyav(tmp_path / name, wav, form, "aac", {})
    rng = np.random.default_rng(0)
    for track in scan_only(str(tmp_path)):
        whole = read_crop(track.source, 0, track.frames, RATE, 1)[0]
        for start in rng.integers(1_000, track.frames - 11_000, size=30):
            crop = read_crop(track.source, int(start), 10_000, RATE, 1)[0]
            around = np.correlate(whole[start - 1_000 : start + 11_000], crop, "valid")
            assert int(np.argmax(around)) == 1_000, track.name


def test_a_folder_of_all_formats_trains(mono_folder, tmp_path, fit):
    for suffix in FORMATS:
        write(tmp_path / "music" / f"{suffix} x.{suffix}", tone(0, 1.5, RATE))
    run = fit(mono_folder, tmp_path / "music", max_steps=1, caption="a tune", batch_size=20)
    assert metrics(run)[0]["step"] == 1


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="no ffmpeg here")
def test_all_kinds_that_ffmpeg_makes_are_read_and_trained_on(mono_folder, tmp_path, fit):
    kinds.make(tmp_path / "music")
    tracks = scan_only(str(tmp_path / "music"))
    assert len(tracks) == len(kinds.KINDS) == 24
    for track in tracks:
        assert abs(track.duration_sec - kinds.SECONDS) < 0.1, track.name
        assert not track.ends_early, track.name
        whole = read_crop(track.source, 0, track.frames, track.sample_rate, 2)
        assert_crops_are_of(whole, track, atol=0.003, count=20)
    run = fit(mono_folder, tmp_path / "music", max_steps=2, caption="a tune", batch_size=12)
    assert len(metrics(run)) == 2


def test_only_known_suffixes_are_opened(tmp_path):
    write(tmp_path / "a.wav", tone(0, 1.0, RATE))
    shutil.copy(tmp_path / "a.wav", tmp_path / "b.m3u8")
    shutil.copy(tmp_path / "a.wav", tmp_path / "c.ape")
    assert only(tmp_path).name == "a.wav"


@pytest.mark.parametrize("suffix", audio.FOR_FFMPEG)
def test_a_list_of_other_files_is_not_followed(suffix, tmp_path):
    sf.write(tmp_path / "other.wav", tone(0, 1.0, RATE), RATE)
    folder = tmp_path / "music"
    folder.mkdir()
    (folder / f"a{suffix}").write_text("ffconcat version 1.0\nfile ../other.wav\n")
    (folder / f"b{suffix}").write_text("#EXTM3U\n#EXTINF:1,\n../other.wav\n#EXT-X-ENDLIST\n")
    with pytest.raises(UserError, match="2 of 2"):
        scan_only(str(folder))
