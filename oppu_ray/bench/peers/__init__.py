"""Other trainers in the training benchmark: each script is run by that trainer's own interpreter, without oppu_ray."""
