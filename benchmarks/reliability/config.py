"""The config of a run at toy size, for commands: `config.py:NAME,STEPS,CHECKPOINT_EVERY`."""

from benchmarks.reliability import toys


def get_config(arg="dit,10,2"):
    name, steps, every = arg.split(",")
    return toys.toy(name, int(steps), int(every))
