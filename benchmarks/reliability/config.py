"""The config of a run at toy size, for commands: `config.py:NAME,STEPS,CHECKPOINT_EVERY,PICTURES`.

PICTURES are the steps between pictures of samples, or evaluations of a first stage; 0 is none.
"""

from benchmarks.reliability import toys


def get_config(arg="dit,10,2,0"):
    name, steps, every, pictures = arg.split(",")
    c = toys.toy(name, int(steps), int(every))
    for block in (c.first_stage.train, c.train):
        block.picture_every = int(pictures)
    c.first_stage.eval.images = 8
    return c
