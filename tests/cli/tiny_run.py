"""What the runs of these tests have in common: a tiny model in the folder `model`, and little to do."""

RUN = {
    "model_name_or_path": "model",
    "dataset_name": "prompts.txt",
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "steps_per_generation": 1,
    "num_inference_steps": 3,
    "height": 16,
    "width": 16,
    "max_steps": 2,
    "use_cpu": True,
    "output_dir": "run",
}
