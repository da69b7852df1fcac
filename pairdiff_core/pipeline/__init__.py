"""The method as a pipeline: a run, its models, its five stages, measuring it, and the stages of image diffusion."""

from .control_stages import (
    decode_partners,
    draw_partners,
    sample_controlled,
    segment,
    train_controlnet,
    train_segmenter,
    train_translator,
    translate,
)
from .describe import audit_after_registration, describe_denoiser, describe_pairs, describe_synthetic, describe_vqae
from .image_stages import (
    T1Images,
    encode_training_images,
    sample_latents,
    t1_images,
    train_kl_autoencoder,
    train_latent_denoiser,
    train_student,
)
from .measure import keep_measured, measure, methods, read_measured
from .modality_stages import both_contrasts, train_encoders, train_score_network
from .models import (
    Trained,
    chosen_model,
    default_network,
    find_autoencoder,
    find_model,
    load_model,
    new_control,
    new_denoiser,
    new_encoders,
    new_kl_autoencoder,
    new_latent_unet,
    new_registration,
    new_score_network,
    new_vqae,
    pretrained_models,
)
from .own_data import profile_for, trainable_grid
from .run import Run, open_run
from .run_images import ImageStageResults, run_image_stages
from .stages import (
    StageResults,
    Training,
    decode_pairs,
    encode_fixed_images,
    encode_training_pairs,
    fixed_with_itself,
    images_with_themselves,
    load_or_make,
    load_or_train,
    motions_for,
    number_of_shards,
    run_stages,
    sample_pairs,
    synthesise,
    train_denoiser,
    train_registration,
    train_vqae,
)
