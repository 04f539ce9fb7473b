"""Pictures from sounds: CLAP embedding in, diffusers' own pipelines with load_ip_adapter, PNG out.

    python generate.py --audio dog.wav --out dog.png
    python generate.py --audio dog.wav rain.flac --weights 0.7 0.3            # the sounds mixed, one picture
    python generate.py --audio dog.wav rain.flac --each                       # one each: out-1.png, out-2.png
    python generate.py --audio dog.wav rain.flac --interpolate 6              # from one to the other in 6
    python generate.py --audio storm.wav --every 2                            # a storyboard, one every 2 s
    python generate.py --audio dog.wav --negative-audio rain.flac             # the dog, away from the rain
    python generate.py --audio dog.wav --prompt "at deep dusk" --guidance-text 3 --guidance-audio 6
    python generate.py --audio dog.wav --init-image photo.png --strength 0.6  # begin with a picture
    python generate.py --audio dog.wav --attention-map                        # where the sound acted
    python generate.py --audio dog.wav --scheduler lcm --lora assets/tiny/lcm_lora.safetensors    # in 4 steps

Each PNG has its settings in the text chunk `clap2diffusion`. A silent clip is the null audio, as in training.
"""

import argparse

from clap2diffusion.base.exits import UserError, run_main
from clap2diffusion.base.settings import (
    GUIDANCE,
    LCM_GUIDANCE,
    SEED,
    Number,
    Once,
    check_sampling,
    model_flags,
    new_parser,
    sampling_flags,
)

AUDIO_SCALE, STRENGTH, MOST_PICTURES = 1.0, 0.6, 400


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    sound = parser.add_argument_group("sound", "several files are mixed into one sound, unless --each, "
                                      "--interpolate or --every is given")
    add = sound.add_argument
    add("--audio", nargs="+", required=True, metavar="FILE", action=Once, instead="give all files behind one",
        help="sound files, or videos whose sound is used: any format that libsndfile or FFmpeg reads")
    add("--weights", nargs="+", type=Number(float, 0), metavar="W",
        help="level of each file in the mix, one a file (default: all alike; 0 leaves a file out)")
    add = sound.add_mutually_exclusive_group().add_argument
    add("--each", action="store_true", help="a picture for each file: NAME-1.png, NAME-2.png, ...")
    add("--interpolate", type=Number(int, 2, MOST_PICTURES), metavar="N",
        help="N pictures from the first of two files to the second: NAME-1.png, ..., as a strip in --out")
    add("--every", type=Number(float, 0.01), metavar="S",
        help="a picture every S seconds of one long file: NAME-1.png, ..., as a storyboard in --out")
    sound.add_argument("--negative-audio", metavar="FILE",
                       help="sound to lead away from (default: none, the null audio)")

    strength = parser.add_argument_group("strength")
    add = strength.add_mutually_exclusive_group().add_argument
    add("--audio-scale", type=Number(float, 0, 10), metavar="X",
        help="strength of the sound, times the learned gate (default: 1)")
    add("--gate", type=Number(float, 0, 1), metavar="G",
        help="strength of the sound in place of the learned gate (0 = no sound)")
    add = strength.add_argument
    add("--guidance", type=Number(float, 1, 100), metavar="G",
        help=f"classifier-free guidance; 1 = none (default: {GUIDANCE:g}; with --scheduler lcm "
             f"{LCM_GUIDANCE:g})")
    add("--guidance-text", type=Number(float, 0, 100), metavar="T",
        help="guidance of the prompt alone; with --guidance-audio, instead of --guidance")
    add("--guidance-audio", type=Number(float, 0, 100), metavar="A", help="guidance of the sound alone")

    add = parser.add_argument_group("picture").add_argument
    add("--prompt", default="", help="text prompt beside the sound ('' = the sound alone)")
    add("--init-image", metavar="FILE",
        help="picture to begin with, cropped as in training (default: noise alone)")
    add("--strength", type=Number(float, 0, 1),
        help="how much of --init-image is drawn anew, 0 to 1 (default: 0.6)")
    add("--seed", type=SEED, default=0,
        help="seed of the starting noise (default: 0); with --each file i takes seed + i - 1")
    add("--size", type=Number(int, 8, 4096, multiple_of=8),
        help="side in pixels (default: the size of training)")
    add("--attention-map", action="store_true",
        help="write beside each picture where the sound acted: NAME-attention.png and NAME-attention.npz")
    add("--out", default="out.png", help="PNG to write (default: out.png)")

    sampling_flags(parser)
    add = model_flags(parser)
    add("--batch-size", type=Number(int, 1), default=16, help="pictures made at once (default: 16)")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other (UserError); fill in defaults that depend on other flags."""
    guided = args.guidance
    check_sampling(args)
    n, weights, pair = len(args.audio), args.weights, (args.guidance_text, args.guidance_audio)
    mode = "--each" if args.each else "--interpolate" if args.interpolate else "--every" if args.every else ""
    strength = STRENGTH if args.strength is None else args.strength
    for wrong, sentence in (
        (weights and mode, f"--weights is for the mix of several sounds; leave it or {mode} out"),
        (weights and len(weights) != n,
         f"--weights: got {len(weights or ())} for {n} --audio files; give one for each file"),
        (weights and not any(weights),
         "--weights: all are 0, so nothing would be heard; raise at least one above 0"),
        (args.interpolate and n != 2,
         f"--interpolate leads from one sound to another, got {n} --audio files; give exactly two"),
        (args.every and n != 1, f"--every goes through one long sound, got {n} --audio files; give one"),
        (pair.count(None) == 1, "--guidance-text and --guidance-audio belong together; give both or neither"),
        (pair.count(None) < 2 and guided is not None,
         "--guidance is replaced by --guidance-text and --guidance-audio; leave it or those two out"),
        (args.negative_audio and args.guidance == 1 and pair.count(None) == 2,
         "--negative-audio acts through guidance, and --guidance 1 means none; raise it above 1"
         if guided else "--negative-audio acts through guidance, and --scheduler lcm draws with none; give "
         "--guidance, such as 1.5"),
        (args.strength is not None and not args.init_image,
         "--strength is for --init-image; give one or leave it out"),
        (args.init_image and int(args.steps * strength) < 1,
         f"--strength {strength:g} of --steps {args.steps} leaves no step to draw; raise one of them"),
        (args.attention_map and args.compile,
         "--attention-map looks between layers that --compile makes one; leave one out"),
        (args.attention_map and (args.interpolate or args.every),
         f"--attention-map is for the single picture and for --each; leave it or {mode} out"),
    ):
        if wrong:
            raise UserError(sentence)
    if pair.count(None) < 2:
        args.guidance = None
    if args.gate is None and args.audio_scale is None:
        args.audio_scale = AUDIO_SCALE
    if args.init_image:
        args.strength = strength


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_flags(args)
    # torch loads after every error that needs none
    from clap2diffusion.pictures.inputs import check_request
    request = check_request(args, MOST_PICTURES)
    from clap2diffusion.pictures.generation import generate
    generate(args, request)


if __name__ == "__main__":
    run_main(main)
