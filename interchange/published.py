"""The 23 checkpoints that OpenAI published for IDDPM and ADM, as named presets.

The files are bare state dicts. Each preset restates the flags of the READMEs of openai/improved-diffusion and
openai/guided-diffusion; other flags have the repository's defaults. Nothing is downloaded here.
"""

from __future__ import annotations

from dataclasses import dataclass

from formats.checkpoint_config import AnyCheckpointConfig
from interchange.openai_flags import Repo, config_from_flags, parse_flag_line

BASE_URL = "https://openaipublic.blob.core.windows.net/diffusion"

LICENCES: dict[Repo, str] = {
    "improved": (
        "OpenAI published these weights beside its MIT-licensed code without separate terms; the data they were "
        "trained on (ImageNet, LSUN, CIFAR-10) is for research. Treat them as for research use only."
    ),
    "guided": (
        "For research use only: OpenAI's model card says that these models are not intended to be commercially "
        "deployed, nor to be used to create propaganda or offensive imagery."
    ),
}
"""Licence notice to show on import, by repository."""

RELEASES: dict[Repo, str] = {"improved": "march-2021", "guided": "jul-2021"}


@dataclass(frozen=True)
class PublishedModel:
    """One published file and its configuration."""

    name: str
    """Name of the preset."""
    file_name: str
    """Published name of the file."""
    repo: Repo
    """The repository whose code trained it."""
    config: AnyCheckpointConfig
    """Model and process."""

    @property
    def url(self) -> str:
        """OpenAI's URL of the file."""
        return f"{BASE_URL}/{RELEASES[self.repo]}/{self.file_name}"

    @property
    def licence(self) -> str:
        """Licence notice to show on import."""
        return LICENCES[self.repo]


def _improved(name: str, file_name: str, flags: str) -> PublishedModel:
    return _published(name, file_name, "improved", flags)


def _guided(name: str, file_name: str, flags: str) -> PublishedModel:
    return _published(name, file_name, "guided", flags)


def _published(name: str, file_name: str, repo: Repo, flags: str) -> PublishedModel:
    config = config_from_flags(repo, parse_flag_line(flags))
    return PublishedModel(name, file_name, repo, config.replace(provenance={**config.provenance, "preset": name}))


def _adm(name: str, file_name: str, flags: str) -> PublishedModel:
    return _guided(name, file_name, f"--learn_sigma True --resblock_updown True {flags}")


_HYBRID = "--num_res_blocks 3 --learn_sigma True --diffusion_steps 4000 --noise_schedule cosine"
_CIFAR10 = f"--image_size 32 --num_channels 128 --dropout 0.3 {_HYBRID}"
_IMAGENET64 = f"--image_size 64 --num_channels 128 {_HYBRID}"
_LSUN = (
    "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
    "--use_scale_shift_norm False --attention_resolutions 16 --rescale_timesteps False"
)
_ADM256 = "--image_size 256 --num_channels 256 --num_head_channels 64 --attention_resolutions 32,16,8"

_MODELS = (
    _improved("cifar10-uncond-50m", "cifar10_uncond_50M_500K.pt", _CIFAR10),
    _improved("cifar10-uncond-vlb-50m", "cifar10_uncond_vlb_50M_500K.pt", f"{_CIFAR10} --use_kl True"),
    _improved("imagenet64-uncond-100m", "imagenet64_uncond_100M_1500K.pt", _IMAGENET64),
    _improved("imagenet64-uncond-vlb-100m", "imagenet64_uncond_vlb_100M_1500K.pt", f"{_IMAGENET64} --use_kl True"),
    _improved(
        "imagenet64-cond-270m",
        "imagenet64_cond_270M_250K.pt",
        f"--image_size 64 --num_channels 192 --class_cond True --rescale_timesteps False {_HYBRID}",
    ),
    _improved(
        "imagenet-upsampler-64-256",
        "upsample_cond_500K.pt",
        "--large_size 256 --small_size 64 --num_channels 192 --num_res_blocks 2 --learn_sigma True "
        "--class_cond True --diffusion_steps 4000 --noise_schedule linear --rescale_timesteps False",
    ),
    _improved("lsun-bedroom-256-1200k", "lsun_uncond_100M_1200K_bs128.pt", _LSUN),
    _improved("lsun-bedroom-256-2400k", "lsun_uncond_100M_2400K_bs64.pt", _LSUN),
    _adm(
        "adm-imagenet64",
        "64x64_diffusion.pt",
        "--image_size 64 --num_channels 192 --num_res_blocks 3 --num_head_channels 64 --class_cond True "
        "--attention_resolutions 32,16,8 --use_new_attention_order True --noise_schedule cosine --dropout 0.1",
    ),
    _adm(
        "adm-imagenet128",
        "128x128_diffusion.pt",
        "--image_size 128 --num_channels 256 --num_heads 4 --class_cond True --attention_resolutions 32,16,8",
    ),
    _adm("adm-imagenet256", "256x256_diffusion.pt", f"{_ADM256} --class_cond True"),
    _adm("adm-imagenet256-uncond", "256x256_diffusion_uncond.pt", _ADM256),
    _adm(
        "adm-imagenet512",
        "512x512_diffusion.pt",
        "--image_size 512 --num_channels 256 --num_head_channels 64 --class_cond True --attention_resolutions 32,16,8",
    ),
    _adm(
        "adm-upsampler-64-256",
        "64_256_upsampler.pt",
        "--large_size 256 --small_size 64 --num_channels 192 --num_heads 4 --class_cond True "
        "--attention_resolutions 32,16,8",
    ),
    _adm(
        "adm-upsampler-128-512",
        "128_512_upsampler.pt",
        "--large_size 512 --small_size 128 --num_channels 192 --num_head_channels 64 --class_cond True "
        "--attention_resolutions 32,16",
    ),
    _adm("adm-lsun-bedroom", "lsun_bedroom.pt", f"{_ADM256} --dropout 0.1"),
    _adm("adm-lsun-cat", "lsun_cat.pt", f"{_ADM256} --dropout 0.1"),
    _adm("adm-lsun-horse", "lsun_horse.pt", f"{_ADM256} --dropout 0.1"),
    _adm("adm-lsun-horse-nodropout", "lsun_horse_nodropout.pt", _ADM256),
    _guided("adm-classifier-64", "64x64_classifier.pt", "--image_size 64 --classifier_depth 4"),
    _guided("adm-classifier-128", "128x128_classifier.pt", "--image_size 128 --classifier_depth 2"),
    _guided("adm-classifier-256", "256x256_classifier.pt", "--image_size 256 --classifier_depth 2"),
    _guided("adm-classifier-512", "512x512_classifier.pt", "--image_size 512 --classifier_depth 2"),
)

PUBLISHED: dict[str, PublishedModel] = {model.name: model for model in _MODELS}
"""Every published checkpoint by the name of its preset."""
