"""The guide's four commands on the small models: Japanese names, an old console encoding, no network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import av

from modules.tensor_files import read_tensors

CAPTION = "灰色のうさぎが巣穴の前で伸びをする、緑の丘"

RUN_WITHOUT_NETWORK = """
import runpy, socket, sys

def refuse(*_):
    raise AssertionError("the network was used")

def connect(self, address, connect=socket.socket.connect):
    # Loader processes talk over local sockets.
    return connect(self, address) if self.family == socket.AF_UNIX else refuse()

socket.socket.connect = connect
socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_script(script: Path, *words: object) -> str:
    """Run a script in a process of its own; returns what it printed."""
    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp932", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    result = subprocess.run(
        [sys.executable, "-c", RUN_WITHOUT_NETWORK, script.as_posix(), *map(str, words)],
        env=environment,
        cwd=script.parent,
        capture_output=True,
        encoding="cp932",
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def test_cache_train_and_generate(tiny_models: Path, media: Path, root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "実験 [1]"
    clips = folder / "動画"
    clips.mkdir(parents=True)
    shutil.copy(media / "bunny_25fps_49f.mp4", clips / "うさぎ.mp4")
    (clips / "うさぎ.txt").write_text(CAPTION, encoding="utf-8")
    (clips / "無題.mp4").write_bytes(b"")  # has no caption: listed, not dropped in silence
    dataset = folder / "データ.toml"
    dataset.write_text(
        '[general]\nresolution = [64, 64]\ncaption_extension = ".txt"\nenable_bucket = true\n\n[[datasets]]\n'
        f'video_directory = "{clips.as_posix()}"\ncache_directory = "{(folder / "キャッシュ").as_posix()}"\n'
        'target_frames = [1, 9]\nframe_extraction = "head"\nsource_fps = 25.0\n',
        encoding="utf-8",
    )
    vae = ("--vae", tiny_models / "vae" / "diffusion_pytorch_model.safetensors")
    encoders = (
        *("--text_encoder_qwen", tiny_models / "text_encoder"),
        *("--text_encoder_clip", tiny_models / "text_encoder2"),
    )
    dit = ("--task", "k5-tiny-t2v", "--dit", tiny_models / "model" / "tiny.safetensors")
    text_log = run_script(
        root / "kandinsky5_cache_text_encoder_outputs.py",
        *("--dataset_config", dataset, *encoders, "--batch_size", 4),
    )
    assert "no caption" in text_log
    run_script(root / "kandinsky5_cache_latents.py", "--dataset_config", dataset, *vae)

    lora = folder / "出力" / "うさぎ.safetensors"
    run_script(
        root / "kandinsky5_train_network.py",
        *("--mixed_precision", "bf16", "--dataset_config", dataset, *dit, *encoders, *vae),
        *("--fp8_base", "--sdpa", "--gradient_checkpointing", "--blocks_to_swap", 2),
        *("--max_data_loader_n_workers", 1, "--persistent_data_loader_workers"),
        *("--learning_rate", "1e-4", "--optimizer_type", "AdamW8Bit"),
        *("--optimizer_args", "weight_decay=0.001", "betas=(0.9,0.95)", "--max_grad_norm", 1.0),
        *("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 100),
        *("--network_module", "networks.lora_kandinsky", "--network_dim", 32, "--network_alpha", 32),
        *("--timestep_sampling", "shift", "--discrete_flow_shift", 5.0, "--scheduler_scale", 10.0),
        *("--output_dir", lora.parent, "--output_name", lora.stem),
        *("--save_every_n_epochs", 1, "--max_train_epochs", 2),
    )
    assert (lora.parent / f"{lora.stem}-000001.safetensors").is_file()
    tensors, metadata = read_tensors(lora)
    assert len(tensors) == 2 * (2 * 6 + 4 * 10)
    assert not any(str(tmp_path) in value or CAPTION in value for value in metadata.values())

    video = folder / "動画" / "結果.mp4"
    run_script(
        root / "kandinsky5_generate_video.py",
        *(*dit, *vae, *encoders, "--offload_dit_during_sampling", "--fp8_base", "--dtype", "bfloat16"),
        *("--prompt", CAPTION, "--negative_prompt", "low quality, artifacts", "--frames", 9, "--steps", 3),
        *("--guidance", 5, "--scheduler_scale", 10, "--seed", 42, "--width", 64, "--height", 64),
        *("--output", video, "--lora_weight", lora, "--lora_multiplier", 1.0),
    )
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (64, 64, 24)
        assert sum(1 for _ in container.decode(stream)) == 9
