"""What settings mean, for the model card."""

# Of settings that need a word, for people who know the field but not this project.
MEANINGS = {
    "gamma": "an advantage is sign(x)·abs(x)^(1+γ), x being the scaled reward. At 0 it is linear, as in "
    "GRPO; above, large differences count for more than their size, and small ones for less.",
    "gamma_schedule": "how γ changes during training",
    "gamma_max": "the largest γ of the schedule",
    "scale_rewards": "what divides a reward's distance from its group's mean: the std of the whole batch (SLAS), of "
    "the group (GRPO), or nothing",
    "shape_order": "whether rewards are scaled first, or shaped first",
    "batch_std_of": "rewards whose std it is: centred in each group, or as they are",
    "shaping_baseline": "what is subtracted in each group before shaping: its mean, or what makes advantages sum to "
    "zero",
    "advantage_clip": "bound on the scaled reward, in stds",
    "min_group_std": "groups that differ less are left out",
    "multi_objective_aggregation": "whether several rewards are summed before they are scaled, or after",
    "num_generations": "group size: pictures of one prompt that are compared with each other",
    "generation_batch_size": "pictures per rollout",
    "num_iterations": "passes over each rollout",
    "epsilon": "clip range of the policy's ratio",
    "epsilon_high": "its upper end, where that is another",
    "beta": "weight of the KL divergence from the reference model; at 0 nothing but the clipping holds it back",
    "num_inference_steps": "denoising steps while training",
    "guidance_scale": "guidance while training",
    "eta": "noise of a sampling step while training",
    "noise_schedule": "kind of noise in sampling while training",
    "noise_level": "its level",
    "timestep_fraction": "share of the sampling steps that are trained",
    "sde_window_size": "number of sampling steps that are noisy",
    "kl_reference": "reference of the KL divergence: the adapter as it was at first, or the base model without it",
    "learning_rate": "of the optimizer",
    "optim": "the optimizer",
    "lora_r": "rank of the adapter",
    "lora_alpha": "its scale is lora_alpha / lora_r, or / √lora_r with use_rslora",
    "use_rslora": "see lora_alpha",
    "updates": "optimizer steps",
}
