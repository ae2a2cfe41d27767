use std::io::Write;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use super::*;
use crate::device::GroupPlace;
use crate::ranks::messages::Hello;
use crate::ranks::{Address, Fingerprints, LauncherKind, Requests, Team};

const LIMITS: Limits = Limits { join: Duration::from_secs(30), hang: Duration::from_secs(600) };
/// Long enough for those who are there to come on a busy machine.
const SHORT: Limits = Limits { join: Duration::from_secs(3), ..LIMITS };

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

/// What came and was not asked for yet stays in its order, and a rank that is somewhere else is named with both places.
#[test]
fn what_came_early_is_given_in_its_order() {
    let (ranks, listener) = ranks(2);
    together(&ranks, LIMITS, listener, |rank, control| {
        let control = control.unwrap();
        if rank == 1 {
            ["a", "b"].iter().for_each(|&tag| control.send(tag, tag.into()));
        } else {
            while control.shared.lock().inbox[0].len() < 2 {
                thread::sleep(LOOK);
            }
            assert_eq!(control.receive("a").unwrap(), ["a"]);
            let text = control.receive("c").unwrap_err().to_string();
            assert!(text.contains("rank 1 is at `b`, and this one at `c`"), "{text}");
        }
        control.close();
    });
}

/// Rank 0 waits for a port that another program is about to leave. Where all ranks are on one machine, no other one reaches it.
#[test]
fn rank_0_takes_its_port_and_no_more() {
    let (mut ranks, taken) = ranks(2);
    let port = ranks[0].address.port;
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        drop(taken);
    });
    let here = join::listen(&ranks[0]).unwrap().local_addr().unwrap();
    assert_eq!((here.ip().is_loopback(), here.port()), (true, port));
    ranks[0].local_ranks = 1;
    assert!(join::listen(&ranks[0]).unwrap().local_addr().unwrap().ip().is_unspecified());
}

/// Who has said goodbye sends nothing more: whoever waits for it is told so.
#[test]
fn a_rank_that_has_ended_is_not_waited_for() {
    let (ranks, listener) = ranks(2);
    together(&ranks, LIMITS, listener, |rank, control| {
        let control = control.unwrap();
        if rank == 0 {
            let text = control.receive("never").unwrap_err().to_string();
            assert!(text.contains("rank 1 on"), "{text}");
        }
        control.close();
    });
}

/// The others wait for the goodbye of rank 0, and rank 0 until they have closed their lines, which they do at once.
#[test]
fn ranks_end_together() {
    for late in [0, 1] {
        let (ranks, listener) = ranks(2);
        let (is_ending, started) = (AtomicBool::new(false), Instant::now());
        together(&ranks, LIMITS, listener, |rank, control| {
            let control = control.unwrap();
            if rank == late {
                thread::sleep(Duration::from_millis(300));
                is_ending.store(true, Ordering::SeqCst);
            }
            control.close();
            assert!(is_ending.load(Ordering::SeqCst), "rank {rank} did not wait for rank {late}");
        });
        assert!(started.elapsed() < FAREWELL, "{:?}", started.elapsed());
    }
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
    let cases: [(Spoil, &str); 3] = [
        (|ranks| ranks.place.ranks = 3, "is one of 2 ranks, and rank 1 on"),
        (|ranks| ranks.place.rank = 2, "is beyond the number of ranks"),
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

/// The second process of a rank takes nobody's place: it is refused, and so is the run.
#[test]
fn two_processes_of_one_rank_are_told_so() {
    let (ranks, listener) = ranks(3);
    thread::scope(|scope| {
        let first = scope.spawn(|| Control::join(&ranks[0], LIMITS, Some(listener)).err().unwrap());
        let there = Control::join(&ranks[1], LIMITS, None).unwrap();
        let deadline = Instant::now() + LIMITS.join;
        let again = join::connect(&ranks[1], LIMITS, deadline).err().unwrap();
        let (first, there) = (first.join().unwrap(), there.receive("anything").err().unwrap());
        for (error, code) in [(first, 2), (there, 9), (again, 9)] {
            let text = error.to_string();
            assert!(text.contains("there are two processes of rank 1"), "{text}");
            assert_eq!(error.exit_code(), code, "{text}");
        }
    });
}

/// Who connects and says nothing, as a port scanner does, keeps nobody out.
#[test]
fn a_stranger_who_says_nothing_keeps_no_rank_waiting() {
    let (ranks, listener) = ranks(2);
    let silent = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    // It goes after the time within which ranks must be there.
    thread::spawn(move || {
        thread::sleep(2 * LIMITS.join);
        drop(silent);
    });
    let started = Instant::now();
    together(&ranks, LIMITS, listener, |_, control| control.unwrap().close());
    assert!(started.elapsed() < LIMITS.join, "{:?}", started.elapsed());
}

/// All are told, also a rank that fits and was there before.
#[test]
fn a_rank_of_another_version_is_named_with_both_versions() {
    let (ranks, listener) = ranks(3);
    let older = Hello { version: "0.0.1".into(), ..join::hello(&ranks[2]) };
    thread::scope(|scope| {
        let first = scope.spawn(|| Control::join(&ranks[0], LIMITS, Some(listener)).err().unwrap());
        let second = Control::join(&ranks[1], LIMITS, None).unwrap();
        let deadline = Instant::now() + LIMITS.join;
        let third = join::connect_as(&older, &ranks[2], LIMITS, deadline).err().unwrap();
        let (first, second) = (first.join().unwrap(), second.receive("anything").err().unwrap());
        let (host, ours) = (host(), env!("CARGO_PKG_VERSION"));
        let versions = format!("rank 0 on {host} is mmpo-fast {ours}, and rank 2 on {host} is 0.0.1");
        for (error, code) in [(first, 2), (second, 9), (third, 9)] {
            let text = error.to_string();
            assert!(text.contains(&versions), "{text}");
            assert_eq!(error.exit_code(), code, "{text}");
        }
    });
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

/// Whoever waits for rank 0 hears what happened before it hears that rank 0 ends: else it would take that for the loss.
#[test]
fn a_verdict_goes_out_before_the_goodbye() {
    let (ranks, listener) = ranks(2);
    let errors = together(&ranks, LIMITS, listener, |rank, control| {
        let control = control.unwrap();
        if rank == 1 {
            let error = control.receive("never").err();
            control.begin_end();
            control.close();
            return error;
        }
        let shared = Arc::clone(&control.shared);
        // As while `judge` sends a verdict.
        shared.lock().is_telling = true;
        thread::scope(|scope| {
            scope.spawn(move || control.close());
            thread::sleep(Duration::from_millis(300));
            shared.send_to_all(&Message::Verdict(shared.verdict_of(0, What::Silent(61))));
            shared.lock().is_telling = false;
            shared.changed.notify_all();
        });
        None
    });
    let text = errors[1].as_ref().unwrap().to_string();
    assert!(text.contains("no sign of life for 61 s"), "{text}");
}

/// The time that a process has for its first words is no limit on the words of a rank that is there: a machine may be busy.
#[test]
fn a_rank_that_is_silent_for_some_seconds_is_not_lost() {
    let (ranks, listener) = ranks(2);
    let address = listener.local_addr().unwrap();
    thread::scope(|scope| {
        let first =
            scope.spawn(|| Control::join(&ranks[0], LIMITS, Some(listener)).unwrap().receive("number"));
        let mut second = TcpStream::connect(address).unwrap();
        messages::send(&mut second, &Message::Hello(join::hello(&ranks[1]))).unwrap();
        thread::sleep(join::FIRST_WORDS + Duration::from_secs(1));
        messages::send(&mut second, &Message::Part { tag: "number".into(), value: 7.into() }).unwrap();
        assert_eq!(first.join().unwrap().unwrap(), [Value::from(7)]);
    });
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

/// Each of `ranks` in a thread of its own, as a team.
fn teams<T: Send>(count: usize, work: impl Fn(usize, Team) -> T + Sync) -> Vec<T> {
    let (ranks, listener) = ranks(count);
    together(&ranks, LIMITS, listener, |rank, control| work(rank, Team::of(&ranks[rank], control.unwrap())))
}

/// A collective that ends because another rank failed is no error of the device: what that rank said is the message.
#[test]
fn a_collective_that_another_rank_ended_is_told_as_its_error() {
    let results = teams(3, |rank, team| {
        let result = match rank {
            2 => Err(Error::numerics("loss NaN", "lower the rate")),
            _ => {
                team.barrier("never").unwrap_err();
                Err(Error::device("the collective was aborted", "see the other ranks"))
            }
        };
        team.end(result).unwrap_err()
    });
    assert_eq!(results[2].to_string(), "loss NaN");
    for error in &results[..2] {
        let text = error.to_string();
        assert!(text.contains("rank 2 on") && text.ends_with("loss NaN"), "{text}");
        assert_eq!(error.exit_code(), 9);
    }
}

/// What signals ask of any rank is asked of all.
#[test]
fn requests_of_one_rank_are_those_of_all() {
    let nothing = Requests::default();
    for (asked, expected) in [
        ([nothing; 3], nothing),
        ([nothing, Requests { save: true, ..nothing }, nothing], Requests { save: true, ..nothing }),
        (
            [nothing, nothing, Requests { stop: Some(Signal::Terminate), save: false }],
            Requests { stop: Some(Signal::Terminate), save: false },
        ),
    ] {
        let found = teams(3, |rank, team| {
            let found = team.requests(asked[rank]).unwrap();
            team.end(Ok(())).unwrap();
            found
        });
        assert_eq!(found, [expected; 3]);
    }
}

/// The first thing that is known to have happened stays what happened, and collectives that begin after it end at once.
#[test]
fn the_first_verdict_stays() {
    let (ranks, listener) = ranks(2);
    let verdicts = together(&ranks, LIMITS, listener, |rank, control| {
        let control = control.unwrap();
        if rank == 0 {
            control.shared.judge(control.shared.verdict_of(0, What::Silent(61)));
            control.shared.judge(control.shared.verdict_of(0, What::Died));
        }
        let first = control.verdict_within(LIMITS.join).unwrap();
        let aborted = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&aborted);
        control.on_loss(Arc::new(move || _ = counter.fetch_add(1, Ordering::SeqCst)));
        assert_eq!(aborted.load(Ordering::SeqCst), 1, "rank {rank}");
        control.begin_end();
        control.close();
        first.what
    });
    assert_eq!(verdicts, [What::Silent(61), What::Silent(61)]);
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
