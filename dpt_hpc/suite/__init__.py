"""The fine-tuning suite: networks, pre-trainings, poolings, datasets and seeds, run by any number of workers."""
