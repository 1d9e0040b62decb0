"""The complete default config: every key that exists, with the paper's usual value."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict


def _train_block(**changes: Any) -> ConfigDict:
    """Optimisation of one stage; all stages have the same keys."""
    return ConfigDict(
        dict(
            batch_size=48,  # images per update, over all devices and hosts
            steps=100_000,  # updates of the whole stage
            lr=1e-4,  # peak learning rate, absolute (not scaled by batch or devices)
            lr_decay="constant",  # after the warm-up: constant | cosine | linear
            lr_start=1e-6,  # share of lr at which the warm-up starts
            lr_end=0.0,  # share of lr at the end of a cosine or linear decay
            decay_steps=0,  # step at which the decay ends; 0 = at `steps`
            warmup_steps=0,  # linear warm-up
            optimizer="adamw",  # adamw (the paper's) | muon
            betas=(0.9, 0.999),  # of Adam
            weight_decay=0.0,  # decoupled, as in AdamW
            grad_clip=0.0,  # largest global gradient norm; 0 = no clipping
            accumulate=1,  # microbatches per update, one after the other, to save memory
            moment_dtype="float32",  # of the first moment of Adam or Muon: float32 | bfloat16
            dtype="float32",  # compute type of the networks: float32 | bfloat16
            log_every=100,  # steps between lines of metrics
            picture_every=5000,  # steps between grids of samples or reconstructions; 0 = none
            checkpoint_every=5000,  # steps between checkpoints
            keep_checkpoints=3,  # how many of them stay on disk
            max_skipped=10,  # steps in a row without a finite loss and gradient that end the run
            # Times what it was in the last steps, at which a loss is told of as a spike; 0 = never
            spike_factor=2.0,
            spike_window=100,  # how many steps that are
            # Go back to the last checkpoint before a spike, or before max_skipped, and leave out
            # the data in between
            rollback=False,
            max_rollbacks=3,  # how often at most; another one ends the run
        )
        | changes
    )


def get_config() -> ConfigDict:
    """Returns the complete default, locked: every key that exists, with the paper's usual value."""
    config = ConfigDict(
        dict(
            name="",  # the config file's name; set by the command line, names the workdir
            seed=0,  # of initial weights, data order and all noise
            # Devices along each axis, which changes no result; one may be -1, what is left
            mesh=dict(
                data=-1,  # batches are split over data x fsdp
                fsdp=1,  # weights, averages and optimiser states are split, too
                tensor=1,  # attention heads and hidden units of MLPs are split
                dcn_data=1,  # of `data`, slices (TPU) or hosts joined by a slower network
            ),
            data=dict(
                # emoji | scenes | folder:PATH | tar:SHARD-{00..09}.tar | tfds:NAME
                # | latents:PATH (made of one of these by ldm_jax.encode)
                source="emoji",
                split="train",  # part of the source, e.g. train, test, train[:90%]
                where="",  # keep the examples with COLUMN=VALUE in the metadata; '' = all
                label="label",  # metadata column that serves as the field `label`
                # Metadata column that is tokenized for the field `tokens`; 'captions/text' is what
                # is called text in the column captions. Of several captions one is drawn each time
                # (the first with cache_latents)
                caption="text",
                fields=(),  # columns besides the image that reach the model, e.g. ('label',)
                resolution=256,  # side of the square training images, pixels
                crop="center",  # center | random (a square of 0.5 to 1.0 of the shorter side)
                # Sizes (height, width) of the images that the diffusion model is trained on, e.g.
                # ((64, 64), (96, 64)): each goes to that of the nearest ratio; () = resolution
                buckets=(),
                flip=True,  # mirror half of the images
                threads=8,  # that read and decode
                # Images that cannot be read are replaced by others and listed in bad_images.txt
                max_bad=0.01,  # share of the set above which they end the run; 0 = the first does
                min_side=8,  # pixels that the shorter side must have
                max_pixels=100_000_000,  # that an image may have; more are not even decoded
                low_res=dict(  # of the field `low_res`, which is made of the image
                    factor=4,  # how much smaller
                    degradation="bicubic",  # bicubic | bsr (blur, noise and JPEG in random order)
                    # Largest level of noise that is added, drawn for each example, in [0, 1); the
                    # conditioner noise_level tells the model which
                    noise=0.0,
                ),
                mask="mixed",  # holes of the field `mask`: thin | medium | thick | box | mixed
                cache_latents=False,  # encode the set once and keep its moments in host memory
            ),
            first_stage=dict(
                kind="vq",  # kl | vq | fsq | identity (diffusion on pixels)
                weights="",  # '' = train it first; or a workdir or an exported folder
                width=128,  # channels at full resolution; a multiple of norm_groups
                mult=(1, 2, 4),  # channel multiplier per level; f = patch * 2**(levels - 1)
                depth=2,  # residual blocks per encoder level; the decoder has one more
                attn_downsample=(),  # downsampling factors at which attention is used
                mid_attn=True,  # attention at the lowest resolution
                patch=1,  # pixels per side that enter as channels; 1 in the published models
                norm_groups=32,  # of group normalisation; fewer for narrow networks
                z_channels=3,  # between encoder and decoder and their 1x1 convolutions
                channels=3,  # of the latents
                codes=8192,  # size of the codebook (vq)
                levels=(),  # values that each latent channel is rounded to, e.g. (8, 5, 5, 5) (fsq)
                dropout=0.0,
                loss="l1",  # reconstruction: l1 | l2
                log_variance=0.0,  # at which the posterior's starts; low in short runs (kl)
                perceptual_weight=1.0,  # of LPIPS, added to the error of every element; 0 = none
                # Its weights: '' = those of `python -m ldm_jax.weights fetch lpips`, a path to
                # such a file, or random (untrained, to try the code)
                lpips="",
                # Of the observation: one number, learnt along, that weighs the error of an element
                # against all other terms; False keeps it at 0, as published
                learn_log_variance=False,
                discriminator=dict(
                    weight=0.5,  # of the adversarial term, times the adaptive one; 0 = none
                    factor=1.0,  # of both losses from `start` on
                    start=50_001,  # step before which neither network learns from the other
                    warmup=0,  # steps from `start` on before the autoencoder feels it
                    ramp=0,  # steps after these in which the adversarial term rises to its weight
                    lecam=0.0,  # of the LeCam regulariser of its logits; 0 = none
                    lr=0.0,  # of its AdamW; 0 = that of the autoencoder, or a fifth of muon's
                    loss="hinge",  # hinge | vanilla
                    layers=3,  # of stride 2
                    width=64,  # channels of the first layer
                ),
                kl_weight=1e-6,  # of the KL term, summed over C, h, w (kl)
                codebook_weight=1.0,  # of the codebook and commitment term (vq)
                codebook=dict(
                    rule="gradient",  # gradient (the paper's) | ema (of the latents of each code)
                    decay=0.99,  # of the running averages of `ema`, and of how much codes are used
                    # Codes used less than this share of an even use start again at a latent of
                    # the batch; 0 = never
                    reset=0.0,
                ),
                ema_decay=0.0,  # of the weights that are kept in the end; 0 = the trained ones
                # Latents are multiplied by: stored (what the first stage holds; 1 if just
                # trained) | first_batch (1/std of the first batch) | scalar (1/std of the set)
                # | channel (each channel to mean 0 and std 1) | a number such as 0.18215
                latent_scale="stored",
                stats_images=0,  # images measured for scalar and channel; 0 = the whole set
                eval=dict(  # of the reconstructions, with each picture
                    split="",  # part of the source that is held out; '' = training images
                    images=64,  # how many
                    # Of psnr, ssim, lpips and rfid; lpips also where there is a perceptual term
                    metrics=("psnr", "ssim"),
                ),
                train=_train_block(lr=3.6e-5, betas=(0.5, 0.9), picture_every=1000),
            ),
            denoiser=dict(
                kind="unet",  # unet (the paper's) | dit (a transformer over patches)
                width=224,  # channels at full latent resolution, or of a token; multiples of 32
                # Residual blocks per encoder level, the decoder has one more (unet); blocks (dit)
                depth=2,
                num_heads=0,  # attention heads; 0 = as many as fit heads of head_dim
                head_dim=32,  # channels per head, used where num_heads is 0
                dropout=0.0,
                # What the backward pass computes again, to save memory: none | block (all of each
                # block) | dots (all but products with weights, whose results are kept)
                remat="none",
                # These are for the unet
                mult=(1, 2, 3, 4),  # channel multiplier per level
                attn_downsample=(2, 4, 8),  # downsampling factors at which attention is used
                cross_attention=False,  # transformer blocks that attend to the context
                transformer_depth=1,  # layers per transformer block
                scale_shift=False,  # the time embedding scales and shifts instead of adding
                resblock_resample=False,  # residual blocks instead of convolutions resample
                conv_resample=True,  # False: levels are joined by plain pooling and repetition
                split_qkv_first=False,  # layout of self-attention's qkv in some imported weights
                dit=dict(
                    patch=2,  # latents per side of a token
                    positions="rotary",  # rotary (turns queries and keys) | sincos (added)
                    # How tokens of text, boxes or a class are read: none | cross (attention of its
                    # own) | joint (they take part in self-attention)
                    context="none",
                    mlp="swiglu",  # swiglu (gated) | gelu (the published models')
                    qk_norm=True,  # normalise queries and keys
                ),
            ),
            conditioners=(),  # which of the blocks below are used, e.g. ('label',)
            label=dict(
                num_classes=1000,
                width=512,  # of the embedding; slot vector needs 4 * denoiser.width, or dit's width
                slot="context",  # context (one token for cross-attention) | vector (with time)
                null=True,  # one more row: the null condition for classifier-free guidance
            ),
            text=dict(
                # bert (the paper's transformer, trained with the denoiser) | clip | sentence
                encoder="bert",
                # Folder with its vocabulary; '' = WORKDIR/tokenizer; scenes = the one that comes
                # with the package, for captions of the source `scenes`
                tokenizer="",
                vocab_size=30522,
                width=1280,  # of the tokens
                depth=32,  # layers
                heads=8,
                length=77,  # tokens that a caption is cut or padded to
                mlp_width=5120,  # hidden units per layer (bert: 4 * width)
                activation="gelu",  # gelu | quick_gelu (the published CLIP)
                null_tokens=(101, 102),  # of the empty caption, the null condition; () = none
                pad_token=0,  # fills up to `length`
            ),
            layout=dict(
                vocab_size=8192,  # classes and quantised corners
                width=512,  # of the tokens
                depth=16,  # layers
                length=92,  # tokens: three per box, padding, and two of the crop if there is room
                null=False,  # the empty layout is the null condition for guidance
            ),
            segmentation=dict(
                num_classes=182,
                channels=3,  # that the one-hot map is projected to
                stages=2,  # halvings, down to the size of the latents
            ),
            diffusion=dict(
                # In T time steps: scaled_linear (the paper's) | linear | cosine | sqrt;
                # in continuous time: flow (straight paths) | log_snr (even in its logarithm)
                schedule="scaled_linear",
                beta=(0.0015, 0.0195),  # first and last
                zero_terminal_snr=False,  # move the betas so that the last step is pure noise
                ratios=(0.002, 80.0),  # of noise to signal, at the ends of log_snr
                steps=1000,  # T; in continuous time, the t that the network is told at the end
                predict="eps",  # what the network's output means: eps | x0 | v | flow | edm
                sigma_data=1.0,  # standard deviation of the latents, for edm; near 0.5 for pixels
                loss="l2",  # l2 | l1 | huber
                huber_delta=1.0,  # error from which huber rises linearly
                # Of the errors at each noise level: simple (1 for what is predicted, the paper's)
                # | min_snr | soft_min_snr | p2 | edm | vlb (the variational bound)
                weighting="simple",
                snr_gamma=5.0,  # of min_snr and soft_min_snr (where 4 is usual)
                p2=(1.0, 1.0),  # k and gamma of p2
                # Drawn in training: uniform | logit_normal (of t / T) | log_normal (of the ratio
                # of noise to signal); all but uniform are for continuous time
                times="uniform",
                times_mean=0.0,  # of the normal distribution
                times_std=1.0,
                times_shift=1.0,  # above 1: towards noise, for large images (3 for 1024 pixels)
                learn_log_variance=False,  # of the errors at each level, which divides the loss
            ),
            train=_train_block(
                lr=9.6e-5,
                weight_decay=0.01,
                # Steps between measurements of the FID of samples by the averaged weights, by
                # sample.*, of which WORKDIR/best keeps the best model; 0 = none
                fid_every=0,
                fid_samples=1000,  # how many, at least 2: few are biased, but good to compare steps
                # Real images: '' = training images, at most 10,000; a folder; or an .npz file of
                # statistics, as `ldm_jax.evaluate --write_reference` writes it
                fid_reference="",
            ),
            ema_decay=0.9999,  # of the denoiser's weights, reached by min(decay, (1+n)/(10+n))
            ema_snapshots=dict(  # other averages of denoiser and conditioner, stored in WORKDIR/ema
                # Relative widths of power functions, e.g. (0.05, 0.1), of which `ldm_jax.ema` makes
                # any other width; each takes the memory of the weights once more
                stds=(),
                decays=(),  # like ema_decay, to be used as they are, e.g. (0.999, 0.9999)
                every=5000,  # steps between them; a file has the size of the weights
            ),
            # Of noisy latents, for guidance by its gradient; it needs the field `label`, of
            # label.num_classes, and is trained after the diffusion model, on the same latents
            classifier=dict(
                width=128,  # channels at full latent resolution; a multiple of 32
                mult=(1, 2, 4),  # channel multiplier per level
                depth=2,  # residual blocks per level
                attn_downsample=(1, 2, 4),  # downsampling factors at which attention is used
                head_dim=32,  # channels per attention head
                dropout=0.0,
                # steps: 0 = no classifier; the rest is that of Dhariwal & Nichol 2021
                train=_train_block(
                    steps=0, batch_size=256, lr=3e-4, weight_decay=0.05, picture_every=0
                ),
            ),
            cond_drop_rate=0.0,  # share of training examples that see the null condition
            init_from="",  # workdir whose denoiser and conditioner are the start; '' = random
            sample=dict(
                # ddim | ddpm | plms | euler | euler_ancestral | heun | flow_heun | deis | unipc
                # | dpmpp_2m | dpmpp_2m_sde | dpmpp_3m | dpmpp_3m_sde
                sampler="ddim",
                steps=200,
                eta=1.0,  # of ddim: 0 = deterministic to 1; 1 for ddpm and 0 for all others
                # Noise levels visited: leading | uniform and quad (the reference's grids)
                # | linspace | linspace_open | trailing | karras | log_snr
                spacing="leading",
                guidance_scale=1.0,  # of samples with a condition; 1 = off
                # Share by which guided outputs get the spread of unguided ones (Lin et al. 2024)
                guidance_rescale=0.0,
                guidance_interval=(0.0, 1.0),  # shares of the time range in which there is guidance
                two_calls=False,  # guide by network calls in turn, in the memory of one
                batch_size=16,  # images at a time, over all devices
                num_samples=16,  # images in the grids that training writes
                nearest=False,  # show the nearest training images beside the final grid
            ),
        )
    )
    return config.lock()
