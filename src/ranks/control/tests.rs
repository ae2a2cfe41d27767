use std::io::Write;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use super::*;
use crate::device::GroupPlace;
use crate::ranks::{Address, Fingerprints, LauncherKind, Team};

const LIMITS: Limits = Limits { join: Duration::from_secs(30), hang: Duration::from_secs(600) };
const SHORT: Limits = Limits { join: Duration::from_millis(400), ..LIMITS };

/// Ranks of this machine, and the listener of rank 0.
fn ranks(count: usize) -> (Vec<Ranks>, TcpListener) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let rank = |rank| Ranks {
        place: GroupPlace { rank, ranks: count },
        local_rank: rank,
        local_ranks: count,
        launcher: Some(LauncherKind::Torchrun),
        address: Address { host: Address::LOOPBACK.to_string(), port },
        job: "test".to_string(),
    };
    ((0..count).map(rank).collect(), listener)
}

/// Joins each of `ranks` in a thread of its own; calls `work` there, and returns what it gave.
fn together<T: Send>(
    ranks: &[Ranks],
    limits: Limits,
    listener: TcpListener,
    work: impl Fn(usize, Result<Control>) -> T + Sync,
) -> Vec<T> {
    let mut listener = Some(listener);
    thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .iter()
            .map(|rank| {
                let listener = listener.take_if(|_| rank.is_first());
                let work = &work;
                scope.spawn(move || work(rank.place.rank, Control::join(rank, limits, listener)))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn ranks_exchange_what_they_have_in_the_order_of_ranks() {
    let (ranks, listener) = ranks(4);
    let got = together(&ranks, LIMITS, listener, |rank, control| {
        let control = control.unwrap();
        let got = match rank {
            0 => {
                let all = control.receive("numbers").unwrap();
                control.send("answer", "done".into());
                all
            }
            _ => {
                control.send("numbers", rank.into());
                control.receive("answer").unwrap()
            }
        };
        assert_eq!(control.verdict(), None);
        control.close();
        got
    });
    assert_eq!(got[0], [1, 2, 3].map(Value::from));
    got[1..].iter().for_each(|answer| assert_eq!(answer, &[Value::from("done")]));
}

#[test]
fn who_is_missing_is_named_to_all_who_are_there() {
    let (ranks, listener) = ranks(4);
    let present = [ranks[0].clone(), ranks[2].clone()];
    let results = together(&present, SHORT, listener, |rank, control| match rank {
        0 => control.err().unwrap(),
        _ => control.unwrap().receive("anything").err().unwrap(),
    });
    for error in results {
        let text = error.to_string();
        assert!(text.contains("ranks 1 and 3 of 4 have not come") && error.exit_code() == 9, "{text}");
    }
}

#[test]
fn a_rank_that_finds_nobody_says_where_it_looked() {
    let (ranks, listener) = ranks(2);
    drop(listener);
    let error = Control::join(&ranks[1], SHORT, None).err().unwrap();
    let text = error.to_string();
    assert!(text.contains("rank 1") && text.contains(&ranks[1].address.to_string()), "{text}");
    assert!(text.contains("refused") && error.exit_code() == 9, "{text}");
}

/// Each case: what is wrong with the second rank, and what the message of the first must say.
#[test]
fn a_rank_that_does_not_fit_is_told_to_both() {
    type Spoil = fn(&mut Ranks);
    let cases: [(Spoil, &str); 2] = [
        (|ranks| ranks.place.ranks = 3, "is one of 2 ranks, and rank 1 on"),
        (|ranks| ranks.place = GroupPlace { rank: 0, ranks: 2 }, "two processes of rank 0"),
    ];
    for (spoil, expected) in cases {
        let (ranks, listener) = ranks(2);
        let mut other = ranks[1].clone();
        spoil(&mut other);
        thread::scope(|scope| {
            let first = scope.spawn(|| Control::join(&ranks[0], LIMITS, Some(listener)).err().unwrap());
            // As a rank that connects, whatever number it has been given.
            let refused = join::connect(&other, LIMITS, Instant::now() + LIMITS.join).err().unwrap();
            let error = first.join().unwrap();
            assert!(error.to_string().contains(expected) && error.exit_code() == 2, "{error}");
            assert!(refused.to_string().contains(expected), "{refused}");
        });
    }
}

#[test]
fn strangers_and_ranks_of_other_jobs_are_turned_away() {
    let (ranks, listener) = ranks(2);
    let port = ranks[0].address.port;
    thread::scope(|scope| {
        let first = scope.spawn(|| Control::join(&ranks[0], LIMITS, Some(listener)));
        let mut stranger = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let other = Ranks { job: "another".into(), ..ranks[1].clone() };
        let refused = join::connect(&other, LIMITS, Instant::now() + LIMITS.join).err().unwrap();
        assert!(refused.to_string().contains("`another`"), "{refused}");
        let second = Control::join(&ranks[1], LIMITS, None).unwrap();
        let first = first.join().unwrap().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| first.close());
            second.close();
        });
    });
}

/// A rank that waits too long for its answer hangs up and comes again: what it said the first time is still to be read then.
#[test]
fn a_rank_that_came_twice_is_there_once() {
    let (ranks, listener) = ranks(2);
    let mut early = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    messages::send(&mut early, &Message::Hello(join::hello(&ranks[1]))).unwrap();
    drop(early);
    let limits = Limits { join: Duration::from_secs(5), ..LIMITS };
    let got = together(&ranks, limits, listener, |rank, control| {
        let control = control.unwrap();
        let got = match rank {
            0 => control.receive("number").unwrap(),
            _ => {
                control.send("number", 7.into());
                Vec::new()
            }
        };
        control.close();
        got
    });
    assert_eq!(got[0], [Value::from(7)]);
}

/// Rank 0 may vanish without a word, for instance with its machine's power, while another rank waits for it to tell an error.
#[test]
fn a_rank_that_failed_does_not_wait_for_a_silent_rank_0() {
    let (ranks, listener) = ranks(2);
    let limits = Limits { hang: Duration::from_secs(1), ..LIMITS };
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let control = Control::join(&ranks[1], limits, None).unwrap();
        control.begin_end();
        control.wait_for_first();
        sender.send(()).unwrap();
    });
    let (mut silent, _) = listener.accept().unwrap();
    messages::send(&mut silent, &Message::Welcome("there".into())).unwrap();
    receiver.recv_timeout(Duration::from_secs(20)).unwrap();
}

#[test]
fn times_are_whole_seconds_and_anything_else_is_refused() {
    let of = |value: &str| seconds(variable::HANG, Some(value.into()), LIMITS.hang);
    assert_eq!(of("30").unwrap(), Duration::from_secs(30));
    assert_eq!(of("").unwrap(), LIMITS.hang);
    for value in ["0", "-1", "1.5", "soon", "1000001"] {
        let error = of(value).unwrap_err();
        let (text, help) = (error.to_string(), miette::Diagnostic::help(&error).unwrap().to_string());
        assert!(text.contains(&format!("{} = {value}", variable::HANG)) && error.exit_code() == 2, "{text}");
        assert!(help.contains("from 1 to 1000000"), "{help}");
    }
}

#[test]
fn the_death_of_a_rank_ends_the_collectives_of_all_others() {
    let (ranks, listener) = ranks(3);
    let aborted = Arc::new(AtomicUsize::new(0));
    let errors = together(&ranks, LIMITS, listener, |rank, control| {
        let control = control.unwrap();
        let counter = Arc::clone(&aborted);
        control.on_loss(Arc::new(move || _ = counter.fetch_add(1, Ordering::SeqCst)));
        if rank == 2 {
            // As the system does it when a process is killed.
            let stream = control.shared.peers[0].stream.lock().unwrap();
            stream.shutdown(Shutdown::Both).unwrap();
            control.shared.lock().is_ending = true;
            return None;
        }
        let error = control.receive("never").err();
        control.begin_end();
        control.close();
        error
    });
    for error in &errors[..2] {
        let error = error.as_ref().unwrap();
        assert!(error.to_string().contains("rank 2 on"), "{error}");
        assert!(error.to_string().contains("died") && error.exit_code() == 9, "{error}");
    }
    assert!(aborted.load(Ordering::SeqCst) >= 2, "{aborted:?}");
}

#[test]
fn the_error_of_a_rank_is_the_message_of_all_and_its_own_stays() {
    for failing in [0, 1, 2] {
        let (ranks, listener) = ranks(3);
        let mut listener = Some(listener);
        let results: Vec<Error> = thread::scope(|scope| {
            let threads: Vec<_> = ranks
                .iter()
                .map(|rank| {
                    let listener = listener.take_if(|_| rank.is_first());
                    scope.spawn(move || {
                        let control = Control::join(rank, LIMITS, listener).unwrap();
                        let team = Team::of(rank, control);
                        let result = match rank.place.rank == failing {
                            true => Err(Error::numerics("loss NaN", "lower the rate")),
                            false => team.barrier("never"),
                        };
                        team.end(result).unwrap_err()
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for (rank, error) in results.iter().enumerate() {
            let text = error.to_string();
            match rank == failing {
                true => assert!(text == "loss NaN" && error.exit_code() == 7, "{text}"),
                false => {
                    let expected = format!("rank {failing} on");
                    assert!(text.contains(&expected) && text.ends_with("loss NaN"), "{text}");
                    assert_eq!(error.exit_code(), 9);
                }
            }
        }
    }
}

#[test]
fn inputs_that_differ_are_named_with_both_ranks() {
    let (ranks, listener) = ranks(3);
    let fingerprints = |model: &str| Fingerprints {
        model: model.into(),
        data: "d".into(),
        evaluation: String::new(),
        reference: String::new(),
        config: "seed = 42".into(),
    };
    let mut listener = Some(listener);
    let errors: Vec<Error> = thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .iter()
            .map(|rank| {
                let listener = listener.take_if(|_| rank.is_first());
                scope.spawn(move || {
                    let team = Team::of(rank, Control::join(rank, LIMITS, listener).unwrap());
                    let model = if rank.place.rank == 2 { "other" } else { "model" };
                    let result = team.check_fingerprints(fingerprints(model));
                    team.end(result).unwrap_err()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for error in errors {
        let text = error.to_string();
        assert!(text.contains("rank 0 on") && text.contains("and rank 2 on"), "{text}");
        assert!(text.contains("different model (hashes model and other)"), "{text}");
    }
}

#[test]
fn a_folder_is_shared_where_all_see_it() {
    let (ranks, listener) = ranks(2);
    let folder = tempfile::tempdir().unwrap();
    let mut listener = Some(listener);
    thread::scope(|scope| {
        for rank in &ranks {
            let listener = listener.take_if(|_| rank.is_first());
            let folder = folder.path();
            scope.spawn(move || {
                let team = Team::of(rank, Control::join(rank, LIMITS, listener).unwrap());
                team.check_shared(folder).unwrap();
                team.end(Ok(())).unwrap();
            });
        }
    });
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the file is gone");
}

#[test]
fn a_folder_that_another_machine_does_not_see_is_refused() {
    let (ranks, listener) = ranks(2);
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let mut listener = Some(listener);
    thread::scope(|scope| {
        for (rank, folder) in ranks.iter().zip(&folders) {
            let listener = listener.take_if(|_| rank.is_first());
            scope.spawn(move || {
                let team = Team::of(rank, Control::join(rank, LIMITS, listener).unwrap());
                let result = team.check_shared(folder.path());
                let error = team.end(result).unwrap_err();
                let text = error.to_string();
                assert!(text.contains("rank 1 on") && text.contains("does not see the file"), "{text}");
                assert_eq!(error.exit_code(), if rank.is_first() { 2 } else { 9 });
            });
        }
    });
}
