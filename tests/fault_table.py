"""What a user can do wrong, as calls of the command, and what the one line about it must hold."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PAIR = "register fixed.nii.gz moving.nii.gz --out x"
FIT = "fit --config good.yaml"
DIRLAB = f"fit --config {ROOT}/experiments/idir_dirlab_best.yaml --wandb false --data.root"
APPLY = "apply transform.ckpt --points fixed.csv --out x"

# name: (the call, what its line must hold: file or key, expected, found, remedy)
FAULTS: dict[str, tuple[str, tuple[str, ...]]] = {
    # images
    "missing file": (
        "register fixed.nii.gz no.nii.gz --out x",
        ("no.nii.gz: expected a file", "found nothing of that name", "check the path"),
    ),
    "truncated .nii.gz": (
        "register fixed.nii.gz cut.nii.gz --out x",
        ("cut.nii.gz: expected a whole NIfTI file", "found one that cannot be read", "copy or export it again"),
    ),
    "truncated .nii": (
        "register fixed.nii.gz cut.nii --out x",
        ("cut.nii: expected a whole NIfTI file", "found one that cannot be read", "copy or export it again"),
    ),
    "damaged .nii.gz": (
        "register fixed.nii.gz damaged.nii.gz --out x",
        ("damaged.nii.gz: expected a whole NIfTI file", "found one that cannot be read (CRC check failed", "again"),
    ),
    "image of a negative side": (
        "register fixed.nii.gz negative.nii --out x",
        ("negative.nii: expected a whole NIfTI file", "found one that cannot be read", "copy or export it again"),
    ),
    "empty file": ("register void.nii.gz moving.nii.gz --out x", ("void.nii.gz: expected data", "0 bytes", "again")),
    "text named .nii.gz": (
        "register text.nii.gz moving.nii.gz --out x",
        ("text.nii.gz: expected a whole NIfTI file", "found one that cannot be read", "copy or export it again"),
    ),
    "another format": (
        "register fixed.csv moving.nii.gz --out x",
        ("fixed.csv: expected .nii", "found .csv", "convert"),
    ),
    "4-D image": (
        "register fixed.nii.gz series.nii.gz --out x",
        ("series.nii.gz: expected a 3-D image", "found 4-D of shape (32, 32, 32, 2)", "give one volume of it"),
    ),
    "NaN voxels": (
        "register fixed.nii.gz nan.nii.gz --out x",
        ("nan.nii.gz: expected finite voxels", "found 1 of 32768", "replace them"),
    ),
    "constant image": (
        "register fixed.nii.gz constant.nii.gz --out x",
        ("constant.nii.gz: expected an image with contrast", "found the constant 5", "is it the right file?"),
    ),
    "singular affine": (
        "register flat.nii.gz moving.nii.gz --out x",
        ("flat.nii.gz: expected an invertible affine", "found [[", "correct sform and qform"),
    ),
    # masks, labels, landmarks
    "empty mask": (
        f"{PAIR} --fixed-mask empty.nii.gz",
        ("empty.nii.gz: expected a mask with voxels above 0.5", "found none", "give a mask that is not empty"),
    ),
    "mask of another shape": (
        f"{PAIR} --fixed-mask small.nii.gz",
        ("small.nii.gz: expected the grid of its image, shape (32, 32, 32)", "found (30, 32, 32)", "resample"),
    ),
    "labels of another shape": (
        f"{PAIR} --moving-labels small.nii.gz",
        ("small.nii.gz: expected the grid of its image", "found", "resample"),
    ),
    "landmark counts that differ": (
        f"{PAIR} --fixed-points fixed.csv --moving-points short.csv",
        ("expected as many fixed as moving landmarks", "found 50 and 3", "give both files"),
    ),
    "landmark outside the image": (
        f"{PAIR} --fixed-points far.csv --moving-points short.csv",
        ("far.csv: expected points inside", "found 1 of 3 outside", "index 1: (500.00", "check --points-space"),
    ),
    "landmarks behind their numbers": (
        f"{PAIR} --fixed-points counted.csv --moving-points short.csv",
        ("counted.csv: expected x, y and z", "found a first column that counts the rows", "name the columns"),
    ),
    "landmarks that are no numbers": (
        f"{PAIR} --fixed-points words.csv --moving-points short.csv",
        ("words.csv: expected a number in row 2", "found 'two'", "correct that row"),
    ),
    # options
    "unknown preset": (f"{PAIR} --preset slow", ("--preset", "invalid choice: 'slow'", "choose from 'fast'")),
    "unknown similarity": (f"{PAIR} --similarity ncx", ("--similarity", "'ncx'", "choose from 'lncc'")),
    "unknown start": (f"{PAIR} --init afine", ("--init: expected none, rigid, affine", "afine")),
    "checkpoint as a start": (
        f"{PAIR} --init transform.ckpt",
        ("transform.ckpt: expected a transform as 4 x 4 numbers", "found other binary data", "displacement.nii.gz"),
    ),
    "Learn2Reg's displacement between two grids": (
        "register fixed.nii.gz elsewhere.nii.gz --write l2r --out x",
        ("--write l2r: expected two images on one grid", "found another one of the moving image", "resample"),
    ),
    "misspelt option": (f"{PAIR} --presett fast", ("--presett: no such option; did you mean --preset?",)),
    "images by name": (
        "register --fixed fixed.nii.gz --moving moving.nii.gz --out x",
        ("--fixed: no such option", "medinr register FIXED MOVING", "see medinr register --help"),
    ),
    "output without its option": (
        "register fixed.nii.gz moving.nii.gz x",
        ("x: one argument too many; did you mean --out x?",),
    ),
    "short option": ("register fixed.nii.gz moving.nii.gz -o x", ("-o: no such option; did you mean --out?",)),
    "option before the command": (
        "--config good.yaml fit",
        ("--config: expected a command first", "found an option", "medinr COMMAND --config"),
    ),
    "experiment without its option": (
        "fit good.yaml",
        ("good.yaml: one argument too many; did you mean --config good.yaml?",),
    ),
    "misspelt command": ("registr a b", ("registr: no such command; did you mean register?",)),
    "a GPU where there is none": (
        f"{PAIR} --device cuda",
        ("--device cuda", "PyTorch finds no such device", "leave --device out or give cpu"),
    ),
    # output
    "output below a file": (
        "register fixed.nii.gz moving.nii.gz --out fixed.csv/x",
        ("fixed.csv/x: expected a folder that can be written to", "found Not a directory", "choose another"),
    ),
    "output where nobody may write": (
        "register fixed.nii.gz moving.nii.gz --out /proc/medinr",
        ("/proc/medinr: expected a folder that can be written to", "found", "choose another"),
    ),
    "output of apply where nobody may write": (
        "apply transform.ckpt --points fixed.csv --out /proc/medinr",
        ("/proc/medinr: expected a folder that can be written to", "found", "choose another"),
    ),
    "output that is an input": (
        "register fixed.nii.gz old/warped.nii.gz --out old",
        ("--out old: expected to overwrite no input", "found old/warped.nii.gz", "choose another folder"),
    ),
    "output that is a channel": (
        "register old/warped.nii.gz moving.nii.gz --fixed-channel fixed.nii.gz --moving-channel moving.nii.gz "
        "--out old",
        ("--out old: expected to overwrite no input", "found old/warped.nii.gz", "choose another folder"),
    ),
    "output that is the transform to apply": (
        "apply old/image.nii.gz --points fixed.csv --out old",
        ("--out old: expected to overwrite no input", "found old/image.nii.gz", "choose another folder"),
    ),
    "output of apply that is an input": (
        "apply transform.ckpt --points old/points.csv --out old",
        ("--out old: expected to overwrite no input", "found old/points.csv", "choose another folder"),
    ),
    "runs where nobody may write": (
        f"{FIT} --runs /proc/medinr",
        ("/proc/medinr", "cannot be made", "choose other --runs"),
    ),
    "results where nobody may write": (
        "predict --config good.yaml --ckpt_path transform.ckpt --out /proc/medinr",
        ("/proc/medinr: expected a folder that can be written to", "found", "choose another"),
    ),
    "phantom where nobody may write": (
        "phantom dirlab --cases 1 --size 16 --phases extremes --out /proc/medinr",
        ("/proc/medinr: expected a folder that can be written to", "found", "choose another"),
    ),
    # configurations
    "--config that is an image": (
        "fit --config fixed.nii.gz",
        ("--config: expected YAML text", "found binary data in fixed.nii.gz", "give the path"),
    ),
    "--config missing": ("fit --config none.yaml", ("--config: no file ", "none.yaml; give the path of a YAML file")),
    "no --config": ("fit", ("model", "missing; give --config FILE.yaml")),
    "YAML syntax error": ("fit --config broken.yaml", ("broken.yaml: not valid YAML", "line 12")),
    "float16 on a CPU": (
        f"{FIT} --trainer.precision 16-mixed",
        ("trainer.precision: expected a CUDA device for 16-mixed", "found none", "use bf16-mixed"),
    ),
    "all of float16": (
        f"{FIT} --trainer.precision 16-true",
        ("trainer.precision: expected 32-true, bf16-mixed or 16-mixed", "got 16-true", "need float32"),
    ),
    "unknown key": (f"{FIT} --model.similarty NCC", ("model.similarty", "did you mean", "similarity?")),
    "unknown key in the file": (
        "fit --config key.yaml",
        ("model.field.hiden: SIREN has no such argument; did you mean hidden?",),
    ),
    "misspelt class": (
        "fit --config class.yaml",
        ("model: no class named PairRegistraton; did you mean PairRegistration?",),
    ),
    "misspelt class of a part": (
        f"{FIT} --model.similarity LocalNC",
        ("model.similarity: no class named LocalNC; did you mean LocalNCC?",),
    ),
    "a GPU where there is none, by YAML": (
        f"{FIT} --trainer.accelerator gpu",
        ("trainer: ", "set trainer.accelerator to auto or cpu, it is gpu"),
    ),
    "missing file in a configuration": (
        f"{FIT} --data.fixed no.nii.gz",
        ("no.nii.gz: expected a file", "found nothing"),
    ),
    "NaN voxels in a configuration": (
        f"{FIT} --data.moving nan.nii.gz",
        ("nan.nii.gz: expected finite voxels", "found 1"),
    ),
    "empty mask in a configuration": (
        f"{FIT} --data.fixed_mask empty.nii.gz",
        ("empty.nii.gz: expected a mask", "found"),
    ),
    "landmarks in a configuration": (
        f"{FIT} --data.fixed_points fixed.csv --data.moving_points short.csv",
        ("expected as many", "found 50 and 3", "give both files"),
    ),
    # DIR-LAB
    "wrong .img size": (
        f"{DIRLAB} cut_dirlab",
        ("case1_T50_s.img: expected", "int16", "found 1000", "copy it again"),
    ),
    "landmarks of DIR-LAB outside the image": (
        f"{DIRLAB} far_dirlab",
        ("T00_xyz.txt", "counted from 1", "expected points inside", "found 1 of"),
    ),
    "landmarks of DIR-LAB that differ": (f"{DIRLAB} short_dirlab", ("expected as many", "found", "same order")),
    "no such folder": (
        f"{DIRLAB} nowhere",
        ("nowhere: expected the folder that holds Case1Pack", "found none", "data.root"),
    ),
    "no such case": (
        f"{DIRLAB} cut_dirlab --data.case 2",
        ("cut_dirlab: expected Case2Pack", "found Case1Pack", "set data.root"),
    ),
    "check of nothing": ("check nowhere", ("nowhere: expected a folder of data", "found nothing")),
    # checkpoints
    "no checkpoint": (
        "apply no.ckpt --points fixed.csv --out x",
        ("no.ckpt", "no such checkpoint", "expected a .ckpt file"),
    ),
    "the folder of a checkpoint": (
        "apply old --points fixed.csv --out x",
        ("old: no such checkpoint", "expected a .ckpt file", "did you mean old/transform.ckpt?"),
    ),
    "not a checkpoint": (
        "apply text.ckpt --points fixed.csv --out x",
        ("text.ckpt: not a readable checkpoint", "expected a .ckpt file that medinr wrote"),
    ),
    "truncated checkpoint": (
        "apply cut.ckpt --points fixed.csv --out x",
        ("cut.ckpt: not a readable checkpoint", "expected a .ckpt file that medinr wrote"),
    ),
    "checkpoint of another program": (
        "apply foreign.ckpt --points fixed.csv --out x",
        ("foreign.ckpt: a checkpoint of another program", "expected a .ckpt file that medinr wrote"),
    ),
    "checkpoint with pickled code": (
        "apply code.ckpt --points fixed.csv --out x",
        ("code.ckpt: not a readable checkpoint", "expected a .ckpt file that medinr wrote"),
    ),
    "checkpoint of a method that is not here": (
        "apply gone.ckpt --points fixed.csv --out x",
        ("elsewhere.Method cannot be imported", "install the package"),
    ),
    "checkpoint that names any callable": (
        "apply callable.ckpt --points fixed.csv --out x",
        ("os.system is not a class that medinr builds",),
    ),
    "nothing to carry": ("apply transform.ckpt --out x", ("nothing to carry", "give --image, --labels or --points")),
    "alpha of a transform without": (
        f"{APPLY} --alpha 0.1",
        ("--alpha: transform.ckpt is not conditioned", "leave --alpha out"),
    ),
    "continue from text": (f"{FIT} --ckpt_path good.yaml", ("good.yaml: expected a checkpoint of medinr", "found")),
    "continue from another program's": (
        f"{FIT} --ckpt_path foreign.ckpt",
        ("foreign.ckpt: expected a checkpoint", "found"),
    ),
    "continue from pickled code": (
        f"{FIT} --ckpt_path code.ckpt",
        ("code.ckpt: expected a checkpoint of medinr", "found"),
    ),
    "continue from another method's": (
        f"{FIT} --ckpt_path conditioned.ckpt",
        (
            "conditioned.ckpt: it was written by another",
            "expected PairRegistration",
            "found",
            "ConditionedRegistration",
            "use the config.yaml of its own run",
        ),
    ),
    "continue from nothing": (
        f"{FIT} --ckpt_path last",
        ("expected an earlier unfinished run", "found none", "leave out --ckpt_path"),
    ),
}
