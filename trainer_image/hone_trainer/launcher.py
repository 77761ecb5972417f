"""`accelerate launch`, tied to the life of the supervisor that started it. Run as `python -m hone_trainer.launcher`."""

from accelerate.commands.launch import main

from hone_trainer.process import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    main()
