use super::*;

fn read_all(variables: &[(&str, &str)]) -> Result<Ranks> {
    read(&|name| variables.iter().find(|(held, _)| *held == name).map(|(_, value)| value.to_string()))
}

const TORCHRUN: [(&str, &str); 8] = [
    ("RANK", "5"),
    ("WORLD_SIZE", "8"),
    ("LOCAL_RANK", "1"),
    ("LOCAL_WORLD_SIZE", "4"),
    ("MASTER_ADDR", "node1"),
    ("MASTER_PORT", "29500"),
    ("TORCHELASTIC_RUN_ID", "abc"),
    ("TORCHELASTIC_RESTART_COUNT", "2"),
];

const SRUN: [(&str, &str); 9] = [
    ("SLURM_JOB_ID", "17"),
    ("SLURM_STEP_ID", "0"),
    ("SLURM_NTASKS", "7"),
    ("SLURM_STEP_NUM_TASKS", "7"),
    ("SLURM_PROCID", "6"),
    ("SLURM_LOCALID", "2"),
    ("SLURM_NODEID", "1"),
    ("SLURM_STEP_TASKS_PER_NODE", "4,3"),
    ("SLURM_STEP_NODELIST", "gpu[07-08]"),
];

const MPIRUN: [(&str, &str); 5] = [
    ("OMPI_COMM_WORLD_RANK", "3"),
    ("OMPI_COMM_WORLD_SIZE", "4"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
    ("MASTER_ADDR", "10.0.0.1"),
];

/// The variables without some and with others.
fn changed<'a>(
    variables: &[(&'a str, &'a str)],
    without: &[&str],
    with: &[(&'a str, &'a str)],
) -> Vec<(&'a str, &'a str)> {
    let replaced = |name: &str| without.contains(&name) || with.iter().any(|(other, _)| *other == name);
    variables.iter().filter(|(name, _)| !replaced(name)).chain(with).copied().collect()
}

fn summary(ranks: &Ranks) -> (usize, usize, usize, usize, String) {
    let GroupPlace { rank, ranks: count } = ranks.place;
    (rank, count, ranks.local_rank, ranks.local_ranks, ranks.address.to_string())
}

#[test]
fn every_launcher_says_which_rank_this_is() {
    let torchrun = read_all(&TORCHRUN).unwrap();
    assert_eq!(summary(&torchrun), (5, 8, 1, 4, "node1:29501".into()));
    assert_eq!(torchrun.launcher, Some(LauncherKind::Torchrun));
    assert_eq!(torchrun.job, "torchrun abc 2");

    let srun = read_all(&SRUN).unwrap();
    let (.., address) = summary(&srun);
    assert_eq!((srun.place.rank, srun.place.ranks, srun.local_rank, srun.local_ranks), (6, 7, 2, 3));
    assert!(address.starts_with("gpu07:2"), "{address}");
    assert_eq!(srun.launcher, Some(LauncherKind::Slurm));

    let mpirun = read_all(&MPIRUN).unwrap();
    assert_eq!((mpirun.place.rank, mpirun.local_rank, mpirun.local_ranks), (3, 1, 2));
    assert_eq!(mpirun.address.host, "10.0.0.1");

    let own = [("MMPO_FAST_RANK", "1"), ("MMPO_FAST_RANKS", "2"), ("MMPO_FAST_PORT", "4000")];
    assert_eq!(summary(&read_all(&own).unwrap()), (1, 2, 1, 2, "127.0.0.1:4000".into()));
}

#[test]
fn ranks_of_one_machine_need_no_address() {
    let here = changed(&MPIRUN, &["MASTER_ADDR"], &[("OMPI_COMM_WORLD_LOCAL_SIZE", "4")]);
    assert_eq!(read_all(&here).unwrap().address.host, Address::LOOPBACK);
    let here = changed(&TORCHRUN, &[], &[("LOCAL_WORLD_SIZE", "8"), ("LOCAL_RANK", "5")]);
    assert_eq!(read_all(&here).unwrap().address.to_string(), "127.0.0.1:29501");
}

#[test]
fn the_port_can_be_chosen() {
    let chosen = changed(&TORCHRUN, &[], &[("MMPO_FAST_PORT", "7777")]);
    assert_eq!(read_all(&chosen).unwrap().address.port, 7777);
    let master = changed(&SRUN, &[], &[("MASTER_PORT", "500"), ("MASTER_ADDR", "here")]);
    assert_eq!(read_all(&master).unwrap().address.to_string(), "here:501");
}

/// Two starts of one job, and two steps of it, do not mix.
#[test]
fn each_start_has_a_name_of_its_own() {
    let restarted = changed(&TORCHRUN, &[], &[("TORCHELASTIC_RESTART_COUNT", "3")]);
    assert_ne!(read_all(&restarted).unwrap().job, read_all(&TORCHRUN).unwrap().job);
    let step = changed(&SRUN, &[], &[("SLURM_STEP_ID", "1")]);
    let [one, other] = [read_all(&SRUN).unwrap(), read_all(&step).unwrap()];
    assert!(one.job != other.job && one.address.port != other.address.port, "{one:?}, {other:?}");
}

#[test]
fn one_process_is_an_ordinary_run() {
    let torchrun_of_one =
        [("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "1")];
    // What `sbatch -n 8` leaves in the environment of its script.
    let batch_script = [
        ("SLURM_JOB_ID", "17"),
        ("SLURM_NTASKS", "8"),
        ("SLURM_PROCID", "0"),
        ("SLURM_LOCALID", "0"),
        ("SLURM_JOB_NODELIST", "gpu[07-08]"),
    ];
    let named_batch_step =
        changed(&batch_script, &[], &[("SLURM_STEP_ID", BATCH_STEP), ("SLURM_STEP_NUM_TASKS", "8")]);
    let shell_of_srun = changed(&SRUN, &[], &[("SLURM_STEP_NUM_TASKS", "1"), ("SLURM_PROCID", "0")]);
    let mpirun_of_one = [
        ("OMPI_COMM_WORLD_RANK", "0"),
        ("OMPI_COMM_WORLD_SIZE", "1"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "1"),
    ];
    let own = [("MMPO_FAST_RANK", "0"), ("MMPO_FAST_RANKS", "1")];
    let exported = [("MASTER_ADDR", "node1"), ("MASTER_PORT", "29500"), ("RANK", "")];
    let cases: [&[(&str, &str)]; 8] = [
        &[],
        &torchrun_of_one,
        &batch_script,
        &named_batch_step,
        &shell_of_srun,
        &mpirun_of_one,
        &own,
        &exported,
    ];
    for variables in cases {
        assert_eq!(read_all(variables).unwrap(), Ranks::alone(), "{variables:?}");
    }
}

#[test]
fn launchers_in_each_other() {
    // torchrun as a task of srun, one on each machine.
    let both = changed(&SRUN, &[], &TORCHRUN);
    assert_eq!(read_all(&both).unwrap().launcher, Some(LauncherKind::Torchrun));
    // mpirun starts its daemons with srun.
    let both = changed(&SRUN, &[], &MPIRUN);
    assert_eq!(read_all(&both).unwrap().launcher, Some(LauncherKind::OpenMpi));
    // A batch script that exports WORLD_SIZE and MASTER_ADDR for srun's tasks.
    let exported =
        changed(&SRUN, &[], &[("WORLD_SIZE", "7"), ("MASTER_ADDR", "gpu07"), ("MASTER_PORT", "9000")]);
    let ranks = read_all(&exported).unwrap();
    assert_eq!((ranks.launcher, ranks.address.to_string()), (Some(LauncherKind::Slurm), "gpu07:9001".into()));
}

/// Each case: what the environment is, and what its message must name.
#[test]
fn what_is_wrong_is_named_with_what_it_holds() {
    type Case<'a> = (Vec<(&'a str, &'a str)>, &'a [&'a str]);
    let cases: [Case<'_>; 13] = [
        (
            vec![("RANK", "1")],
            &["torchrun", "half set, without WORLD_SIZE", "RANK = 1", "WORLD_SIZE is not set"],
        ),
        (vec![("WORLD_SIZE", "4")], &["half set, without RANK", "WORLD_SIZE = 4"]),
        (vec![("LOCAL_RANK", "0")], &["half set, without RANK"]),
        (changed(&TORCHRUN, &["LOCAL_RANK"], &[]), &["without LOCAL_RANK"]),
        (changed(&TORCHRUN, &["MASTER_PORT"], &[]), &["where rank 0 is", "MASTER_PORT is not set"]),
        (changed(&TORCHRUN, &[], &[("MASTER_PORT", "0")]), &["MASTER_PORT = 0 is not a port"]),
        (changed(&TORCHRUN, &[], &[("RANK", "8")]), &["no rank 8 among 8"]),
        (changed(&TORCHRUN, &[], &[("LOCAL_RANK", "4")]), &["no local rank 4 among 4"]),
        (changed(&TORCHRUN, &[], &[("RANK", "two")]), &["RANK = two, which is not a count"]),
        (vec![("WORLD_SIZE", "1"), ("RANK", "1")], &["no rank 1 among 1"]),
        (changed(&MPIRUN, &["MASTER_ADDR"], &[]), &["mpirun", "MASTER_ADDR is not set"]),
        (changed(&SRUN, &["SLURM_LOCALID"], &[]), &["srun", "without SLURM_LOCALID"]),
        (changed(&SRUN, &[], &[("WORLD_SIZE", "8")]), &["7 ranks", "WORLD_SIZE = 8 contradicts"]),
    ];
    for (variables, parts) in cases {
        let error = read_all(&variables).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        for part in parts {
            assert!(error.to_string().contains(part), "no {part:?} in: {error}");
        }
    }
}

#[test]
fn two_launchers_that_contradict_each_other_are_both_named() {
    let exported = changed(&TORCHRUN, &["TORCHELASTIC_RUN_ID"], &[]);
    let error = read_all(&changed(&SRUN, &[], &exported)).unwrap_err();
    for part in ["contradict", "RANK = 5", "SLURM_PROCID = 6", "SLURM_STEP_NUM_TASKS = 7"] {
        assert!(error.to_string().contains(part), "no {part:?} in: {error}");
    }
}
