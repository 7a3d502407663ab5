"""
Pretrain the embedded text-to-image pipeline and its contrastive reward, from nothing, on pictures of colored shapes.

    python examples/pretrain_shapes.py --output_dir shapes_pretraining
    torchrun --nproc_per_node 2 examples/pretrain_shapes.py --output_dir shapes_pretraining --stage denoiser

Stages run in order (`vae`, `text`, `bank`, `denoiser`, `clip`, `export`); each leaves a file in `--output_dir`, and a
stage whose file is there is skipped, so an interrupted run is started again with the same command.
`docs/source/shapes.md` has the time, the losses and the seed of the weights that the package ships.
"""

import argparse
import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from shapes_pictures import sample_pictures
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from slas_trl.shapes import world


logger = logging.getLogger("pretrain_shapes")
STAGES = ("vae", "text", "bank", "denoiser", "clip", "export")
MAX_TOKENS = 16


def build_tokenizer() -> CLIPTokenizer:
    """One token for each word of the world; any other word is spelled in letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.!?-'"
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    merges: Any = []
    # Longest first: a merge of an earlier word would otherwise break up a later one ("an" of "and" in "triangle").
    words = {word for text in world.all_captions() for word in text.split()}
    for word in sorted(words, key=lambda word: (-len(word), word)):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
                vocab.append("".join(pair))
            pieces[:2] = ["".join(pair)]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(vocab))}, merges=merges, model_max_length=MAX_TOKENS
    )


def build_text_encoder(tokenizer: Any, hidden_size: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            projection_dim=hidden_size,
            num_hidden_layers=2,
            num_attention_heads=hidden_size // 16,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def build_denoiser(width: int, layers: int) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=96,
        caption_projection_dim=width,
        pooled_projection_dim=96,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )


def build_vae() -> Any:
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(1, 1, 0),
        latent_channels=8,
    )


def pictures(n: int, rng: np.random.Generator, wrong: float = 0.0) -> tuple[list[str], torch.Tensor]:
    """Captions and pictures `(n, 3, 32, 32)` in [-1, 1]."""
    captions, batch = sample_pictures(n, rng, wrong=wrong)
    return captions, torch.from_numpy(batch).permute(0, 3, 1, 2) * 2 - 1


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")[
        "input_ids"
    ]


def encode(encoders: nn.ModuleList, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `encode_prompt` of Stable Diffusion 3 makes of token ids: sequence `(B, 16, 96)` and pooled `(B, 96)`."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    sequence = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return sequence, torch.cat([output.text_embeds for output in outputs], dim=-1)


def cosine(step: int, steps: int, warmup: int = 200) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to 0.01."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_vae(args, path: Path) -> None:
    rng = np.random.default_rng(args.seed)
    vae = build_vae().to(memory_format=torch.channels_last)  # 1.4 times as fast on a CPU
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    steps = args.vae_steps
    for step in range(steps):
        joint = step < steps // 2
        if step == steps // 2:
            vae.encoder.requires_grad_(False)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * cosine(step, steps)
        x = pictures(32, rng)[1].to(memory_format=torch.channels_last)
        latents = vae.encode(x).latents
        # Noise on the latents keeps them smooth, so that a denoiser's small errors stay small in the picture.
        z = latents + 0.08 * latents.detach().std() * torch.randn_like(latents)
        decoded = vae.decode(z).sample
        loss = F.l1_loss(decoded, x) + 2 * F.mse_loss(decoded, x)
        if joint:
            loss = loss + 1e-3 * latents.pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step == steps - 1:
            logger.info("vae step %d loss %.4f mse %.5f", step, loss.item(), F.mse_loss(decoded, x).item())
    with torch.no_grad():
        latents = vae.eval().encode(pictures(1024, rng)[1]).latents
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    vae.save_pretrained(path)


class CaptionReader(nn.Module):
    """Reads every demand of a caption off its pooled embedding: gives the text encoders something to learn first."""

    def __init__(self):
        super().__init__()
        self.sizes = [6, 4, 4, 7, 3, 5, 7, 3, 5, 3]
        self.head = nn.Linear(96, sum(self.sizes))

    @staticmethod
    def labels(captions: list[str]) -> torch.Tensor:
        def index(options, value):
            return options.index(value) if value else len(options)

        rows = []
        for text in captions:
            c = world.parse_caption(text)
            second = c.things[1] if len(c.things) == 2 else world.Thing("")
            rows.append(
                [
                    world.CATEGORIES.index(c.category),
                    c.count - 1,
                    world.SHAPES.index(c.things[0].shape),
                    index(world.COLORS, c.things[0].color),
                    index(world.SIZES, c.things[0].size),
                    index(world.SHAPES, second.shape),
                    index(world.COLORS, second.color),
                    index(world.SIZES, second.size),
                    index(world.RELATIONS, c.relation),
                    index(world.GROUNDS, c.ground),
                ]
            )
        return torch.tensor(rows)

    def loss(self, pooled: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(pooled).split(self.sizes, dim=-1)
        return torch.stack([F.cross_entropy(x, labels[:, i]) for i, x in enumerate(logits)]).mean()


def train_text(args, path: Path) -> None:
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed + 1)
    tokenizer = build_tokenizer()
    encoders: Any = nn.ModuleList([build_text_encoder(tokenizer, 64), build_text_encoder(tokenizer, 32)])
    reader = CaptionReader()
    optimizer = torch.optim.AdamW([*encoders.parameters(), *reader.parameters()], lr=2e-3, weight_decay=1e-3)
    texts = [caption.text for caption in world.captions_of("train")]
    ids, labels = tokenize(tokenizer, texts), CaptionReader.labels(texts)
    for step in range(args.text_steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * cosine(step, args.text_steps)
        rows = torch.from_numpy(rng.integers(len(texts), size=256))
        loss = reader.loss(encode(encoders, ids[rows])[1], labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0 or step == args.text_steps - 1:
            logger.info("text step %d loss %.4f", step, loss.item())
    tokenizer.save_pretrained(path / "tokenizer")
    for i, encoder in enumerate(encoders):
        encoder.save_pretrained(path / f"text_encoder_{i}")


def load_text(path: Path) -> tuple[CLIPTokenizer, Any]:
    encoders = [CLIPTextModelWithProjection.from_pretrained(path / f"text_encoder_{i}") for i in range(2)]
    return CLIPTokenizer.from_pretrained(path / "tokenizer"), nn.ModuleList(encoders)


@torch.no_grad()
def build_bank(args, path: Path) -> None:
    """Encode the training pictures once: latents `(N, 8, 8, 8)` in float16 and token ids."""
    rng = np.random.default_rng(args.seed + 2)
    vae: Any = AutoencoderTiny.from_pretrained(args.output_dir / "vae").eval()
    tokenizer, _ = load_text(args.output_dir / "text")
    latents, ids = [], []
    for _ in range(args.bank_size // 1000):
        captions, x = pictures(1000, rng, wrong=args.wrong_captions)
        z = (vae.encode(x).latents - vae.config.shift_factor) * vae.config.scaling_factor
        latents.append(z.half())
        ids.append(tokenize(tokenizer, captions).to(torch.uint16))
    torch.save({"latents": torch.cat(latents), "ids": torch.cat(ids)}, path)


def flow_loss(denoiser, encoders, latents, ids, generator) -> torch.Tensor:
    """Per-sample flow-matching loss `(B,)` with t drawn towards noise, where the text decides."""
    t = torch.sigmoid(0.8 + 1.3 * torch.randn(len(latents), generator=generator))
    noise = torch.randn(latents.shape, generator=generator)
    noisy = torch.lerp(latents, noise, t[:, None, None, None])
    sequence, pooled = encode(encoders, ids)
    velocity = denoiser(noisy, timestep=1000 * t, encoder_hidden_states=sequence, pooled_projections=pooled).sample
    return (velocity - (noise - latents)).pow(2).mean((1, 2, 3))


class Policy(nn.Module):
    """Denoiser and text encoders, trained together."""

    def __init__(self, denoiser, encoders):
        super().__init__()
        self.denoiser, self.encoders = denoiser, encoders

    def forward(self, latents, ids, generator):
        return flow_loss(self.denoiser, self.encoders, latents, ids, generator)


def train_denoiser(args, path: Path) -> None:
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(args.seed)
    tokenizer, encoders = load_text(args.output_dir / "text")
    policy = Policy(build_denoiser(args.width, args.layers), encoders)
    parameters = dict(policy.named_parameters())
    # Muon for the matrices inside the blocks, AdamW for embeddings, norms, biases and the text encoders.
    hidden = [k for k, p in parameters.items() if p.ndim == 2 and ".transformer_blocks." in k]
    optimizers = [
        torch.optim.Muon(
            [parameters[k] for k in hidden], lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [p for k, p in parameters.items() if k not in hidden], lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01
        ),
    ]
    average = {k: p.detach().clone() for k, p in parameters.items()}
    checkpoint, first = path.with_suffix(".ckpt"), 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        policy.load_state_dict(state["policy"])
        average, first = state["average"], state["step"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    model = nn.parallel.DistributedDataParallel(policy) if world_size > 1 else policy
    run = torch.compile(model) if args.compile else model

    bank = torch.load(args.output_dir / "bank.pt", weights_only=True)
    empty = tokenize(tokenizer, [""])[0]
    batch = args.batch_size // world_size
    start = last = time.time()
    losses = []
    for step in range(first, args.steps):
        generator = torch.Generator().manual_seed((args.seed * 1_000_003 + step) * 64 + rank)
        rows = torch.randint(len(bank["latents"]), (batch,), generator=generator)
        latents, ids = bank["latents"][rows].float(), bank["ids"][rows].long()
        ids[torch.rand(batch, generator=generator) < 0.1] = empty  # for classifier-free guidance
        factor = cosine(step, args.steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * factor
        loss = run(latents, ids, generator).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(args.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(parameters.values()), 1 - decay)
        losses.append(loss.item())
        if rank == 0 and (step + 1) % 250 == 0:
            with torch.no_grad():  # the gap between right and shuffled captions says whether the text is used
                g = torch.Generator().manual_seed(7)
                rows = torch.arange(256)
                z, y = bank["latents"][rows].float(), bank["ids"][rows].long()
                right = flow_loss(policy.denoiser, policy.encoders, z, y, g).mean()
                g.manual_seed(7)
                shuffled = flow_loss(policy.denoiser, policy.encoders, z, y.roll(1, 0), g).mean()
            logger.info(
                "denoiser step %d loss %.4f gap %.4f, %.1f pictures/s, %.0f s",
                step + 1, np.mean(losses), shuffled - right, 250 * args.batch_size / (time.time() - last), time.time()
                - start,
            )  # fmt: skip
            losses, last = [], time.time()
        if rank == 0 and (step + 1) % 1000 == 0:
            state = {"policy": policy.state_dict(), "average": average, "step": step + 1}
            torch.save({**state, "optimizers": [o.state_dict() for o in optimizers]}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").rename(checkpoint)
    if rank == 0:
        policy.load_state_dict({**policy.state_dict(), **average})
        torch.save(policy.state_dict(), path)
    if world_size > 1:
        torch.distributed.destroy_process_group()


def train_clip(args, path: Path) -> None:
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed + 3)
    tokenizer, _ = load_text(args.output_dir / "text")
    text = dict(
        build_text_encoder(tokenizer, 48).config.to_dict(),
        num_attention_heads=3,
        num_hidden_layers=1,
        projection_dim=32,
    )
    vision = {
        "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": world.RESOLUTION, "patch_size": 4, "projection_dim": 32,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.01)
    for step in range(args.clip_steps):
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * cosine(step, args.clip_steps)
        captions, x = pictures(128, rng, wrong=args.wrong_captions)
        loss = model(input_ids=tokenize(tokenizer, captions), pixel_values=x, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.logit_scale.data.clamp_(max=4.6)
        if step % 200 == 0 or step == args.clip_steps - 1:
            logger.info("clip step %d loss %.4f", step, loss.item())
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def export(args, path: Path) -> None:
    """Write the pipeline and the reward in float16, as the package ships them."""
    tokenizer, encoders = load_text(args.output_dir / "text")
    policy = Policy(build_denoiser(args.width, args.layers), encoders)
    trained = args.output_dir / "denoiser.pt"
    if trained.exists():
        policy.load_state_dict(torch.load(trained, weights_only=True))
    else:
        state = torch.load(args.output_dir / "denoiser.ckpt", weights_only=True)
        policy.load_state_dict({**state["policy"], **state["average"]})
    parts: dict[str, Any] = {
        "transformer": policy.denoiser,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=args.shift),
        "vae": AutoencoderTiny.from_pretrained(args.output_dir / "vae"),
        "text_encoder": encoders[0],
        "tokenizer": tokenizer,
        "text_encoder_2": encoders[1],
        "tokenizer_2": tokenizer,
        "text_encoder_3": None,
        "tokenizer_3": None,
    }
    pipe = StableDiffusion3Pipeline(**parts)
    pipe.to(dtype=torch.float16).save_pretrained(path / "pipeline")
    if (args.output_dir / "clip").exists():
        CLIPModel.from_pretrained(args.output_dir / "clip").half().save_pretrained(path / "clip")
        tokenizer.save_pretrained(path / "clip")
    for config in path.rglob("config.json"):  # without the folder that it was loaded from
        settings = json.loads(config.read_text())
        settings.pop("_name_or_path", None)
        config.write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--stage", choices=STAGES, action="append", help="stages to run; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae_steps", type=int, default=6000)
    parser.add_argument("--text_steps", type=int, default=800)
    parser.add_argument("--bank_size", type=int, default=160_000)
    parser.add_argument("--wrong_captions", type=float, default=0.1)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=96)
    parser.add_argument("--steps", type=int, default=17_000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--clip_steps", type=int, default=1500)
    parser.add_argument("--shift", type=float, default=1.0, help="timestep shift of the exported scheduler")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "arguments.json").write_text(json.dumps(vars(args), default=str, indent=2))
    run = {
        "vae": train_vae, "text": train_text, "bank": build_bank, "denoiser": train_denoiser, "clip": train_clip,
        "export": export,
    }  # fmt: skip
    for stage in args.stage or STAGES:
        path = args.output_dir / {"bank": "bank.pt", "denoiser": "denoiser.pt"}.get(stage, stage)
        if path.exists() and stage != "export":
            logger.info("%s: already there", stage)
            continue
        start = time.time()
        run[stage](args, path)
        logger.info("%s: done in %.0f s", stage, time.time() - start)


if __name__ == "__main__":
    main()
