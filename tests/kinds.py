"""Make a folder of recordings of every kind with ffmpeg: `python tests/kinds.py FOLDER`.

They sound alike, and are SECONDS long.
"""

import subprocess
import sys
from pathlib import Path

SECONDS = 6
SOUND = f"aevalsrc=0.4*sin(880*PI*t*(1+t/20))*exp(-mod(t\\,0.5)*4)|0.3*sin(550*PI*t):d={SECONDS}"
PICTURE = ["-f", "lavfi", "-i", f"testsrc=d={SECONDS}:s=64x64:r=5", "-c:v", "mpeg4"]
KINDS = {  # name: what ffmpeg is told; a name with "pipe" is written to one, so without a length
    "16 bits.wav": "-c:a pcm_s16le",
    "float.wav": "-c:a pcm_f32le",
    "rf64.wav": "-c:a pcm_s24le -rf64 always",
    "adpcm.wav": "-c:a adpcm_ms",
    "pcm w64.w64": "-c:a pcm_s16le",
    "pcm aiff.aiff": "-c:a pcm_s16be",
    "24 bits.aif": "-c:a pcm_s24be",
    "plain.flac": "-c:a flac",
    "pipe.flac": "-c:a flac -f flac",
    "cbr.mp3": "-c:a libmp3lame -b:a 128k",
    "vbr.mp3": "-c:a libmp3lame -q:a 4",
    "vbr without a header.mp3": "-c:a libmp3lame -q:a 4 -write_xing 0 -id3v2_version 0",
    "vorbis.ogg": "-c:a libvorbis",
    "flac in.ogg": "-c:a flac",
    "plain opus.opus": "-c:a libopus",
    "aac.m4a": "-c:a aac",
    "alac.m4a": "-c:a alac",
    "film mp4.mp4": "-c:a aac",
    "adts.aac": "-c:a aac",
    "v1.wma": "-c:a wmav1",
    "v2.wma": "-c:a wmav2",
    "vorbis in mka.mka": "-c:a libvorbis",
    "film.mkv": "-c:a ac3",
    "opus.webm": "-c:a libopus",
}


def make(folder: Path) -> None:
    """Make a recording of each kind."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, options in KINDS.items():
        command = ["ffmpeg", "-v", "error", "-y", "-f", "lavfi", "-i", f"{SOUND}:s=44100"]
        command += PICTURE if name.startswith("film") else []
        if name.startswith("pipe"):
            made = subprocess.run(
                [*command, *options.split(), "-"], check=True, capture_output=True
            )
            (folder / name).write_bytes(made.stdout)
        else:
            subprocess.run([*command, *options.split(), str(folder / name)], check=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
