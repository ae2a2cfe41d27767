//! How the ranks find each other.

use std::collections::BTreeMap;
use std::io::{BufReader, Error as IoError, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::path::Path;
use std::time::{Duration, Instant};

use super::{LOOK, Limits};
use crate::error::{Error, Result};
use crate::interrupt;
use crate::ranks::address::Address;
use crate::ranks::messages::{self, GREETING, Hello, Message};
use crate::ranks::progress::Position;
use crate::ranks::verdict::{Verdict, What};
use crate::ranks::{Ranks, host, variable};

/// How long a process that connects may take for its first words, and a connection for its making.
pub(super) const FIRST_WORDS: Duration = Duration::from_secs(5);
/// How long a write may take; what is written is small.
const WRITE: Duration = Duration::from_secs(5);
/// How long rank 0 tries to get its port: a rank 0 that was just killed may still have it.
const BIND: Duration = Duration::from_secs(10);

/// A connection with another rank.
pub struct Connected {
    pub rank: usize,
    pub host: String,
    pub stream: TcpStream,
    pub reader: TcpStream,
}

/// Rank 0: waits until all others are there.
pub fn gather(
    ranks: &Ranks,
    limits: Limits,
    deadline: Instant,
    listener: Option<TcpListener>,
) -> Result<Vec<Connected>> {
    let listener = match listener {
        Some(listener) => listener,
        None => listen(ranks)?,
    };
    listener.set_nonblocking(true).map_err(|error| cannot_listen(&ranks.address, error))?;
    let mut present = BTreeMap::new();
    let result = accept_all(ranks, limits, deadline, &listener, &mut present);
    if let Err(error) = &result {
        let what = What::Failed {
            message: error.to_string(),
            help: miette::Diagnostic::help(error).map(|help| help.to_string()).unwrap_or_default(),
        };
        let verdict = Verdict { rank: 0, host: host(), position: Position::default(), what };
        for connected in present.values_mut() {
            let _ = messages::send(&mut connected.stream, &Message::Verdict(verdict.clone()));
        }
    }
    result.map(|()| present.into_values().collect())
}

fn accept_all(
    ranks: &Ranks,
    limits: Limits,
    deadline: Instant,
    listener: &TcpListener,
    present: &mut BTreeMap<usize, Connected>,
) -> Result<()> {
    while present.len() + 1 < ranks.place.ranks {
        interrupt::check()?;
        match listener.accept() {
            Ok((stream, from)) => {
                if let Some(connected) = admit(ranks, stream, from, present)? {
                    tracing::debug!("rank {} on {} is there", connected.rank, connected.host);
                    present.insert(connected.rank, connected);
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if Instant::now() >= deadline {
                    return Err(missing(ranks, limits, present));
                }
                std::thread::sleep(LOOK);
            }
            Err(error) => tracing::debug!("{error}"),
        }
    }
    Ok(())
}

fn missing(ranks: &Ranks, limits: Limits, present: &BTreeMap<usize, Connected>) -> Error {
    let absent: Vec<String> = (1..ranks.place.ranks)
        .filter(|rank| !present.contains_key(rank))
        .map(|rank| rank.to_string())
        .collect();
    let shown = match absent.as_slice() {
        [one] => format!("rank {one} of {} has", ranks.place.ranks),
        [some @ .., last] => format!("ranks {} and {last} of {} have", some.join(", "), ranks.place.ranks),
        [] => "a rank has".to_string(),
    };
    Error::rank(
        format!(
            "{shown} not come to rank 0 on {}, port {}, within {} s",
            host(),
            ranks.address.port,
            limits.join.as_secs()
        ),
        format!(
            "look at the output of those ranks, and whether their machines reach that port (firewall); {} chooses another \
             port, {} a longer time",
            variable::PORT,
            variable::JOIN
        ),
    )
}

/// Looks at who has connected: `None` for a stranger, who is turned away.
fn admit(
    ranks: &Ranks,
    mut stream: TcpStream,
    from: SocketAddr,
    present: &BTreeMap<usize, Connected>,
) -> Result<Option<Connected>> {
    let hello = match prepare(&stream).and_then(|reader| read_first(&reader).map(|first| (first, reader))) {
        Ok((Some(Message::Hello(hello)), reader)) if hello.greeting == GREETING => (hello, reader),
        Ok(_) => {
            tracing::debug!("{from} is no rank");
            return Ok(None);
        }
        Err(error) => {
            tracing::debug!("{from} is no rank: {error}");
            return Ok(None);
        }
    };
    let (hello, reader) = hello;
    if has_hung_up(&stream) {
        tracing::debug!("rank {} on {} did not wait for its answer", hello.rank, hello.host);
        return Ok(None);
    }
    if hello.job != ranks.job {
        tracing::warn!("a rank of another job came from {from} ({}), and was turned away", hello.host);
        let reason = format!("it belongs to the job `{}`, and rank 0 to `{}`", hello.job, ranks.job);
        let _ = messages::send(&mut stream, &Message::Refused(reason));
        return Ok(None);
    }
    let refusal = refusal(ranks, &hello, present);
    let answer = match &refusal {
        Some(error) => Message::Refused(error.to_string()),
        None => Message::Welcome(host()),
    };
    let sent = messages::send(&mut stream, &answer);
    match (refusal, sent) {
        (Some(error), _) => Err(error),
        (None, Ok(())) => Ok(Some(Connected { rank: hello.rank, host: hello.host, stream, reader })),
        // It comes again if it is still there.
        (None, Err(_)) => Ok(None),
    }
}

/// Whether the other end has closed the connection. A rank does that when its answer takes too long, because rank 0 has just been
/// started or listens to a stranger, and then connects again; its first connection must not be taken for the rank.
fn has_hung_up(stream: &TcpStream) -> bool {
    let peeked = stream.set_nonblocking(true).and_then(|()| stream.peek(&mut [0]));
    let is_open = match peeked {
        Ok(bytes) => bytes > 0,
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    };
    // A connection that cannot wait for bytes any more is of no use either.
    !is_open || stream.set_nonblocking(false).is_err()
}

/// Why a rank that connected is no rank of this run; `None` where it is one.
fn refusal(ranks: &Ranks, hello: &Hello, present: &BTreeMap<usize, Connected>) -> Option<Error> {
    let (ours, theirs) = (format!("rank 0 on {}", host()), format!("rank {} on {}", hello.rank, hello.host));
    if hello.version != env!("CARGO_PKG_VERSION") {
        let version = env!("CARGO_PKG_VERSION");
        return Some(Error::config(
            format!("{ours} is mmpo-fast {version}, and {theirs} is {}", hello.version),
            "install the same version on all machines",
        ));
    }
    if hello.ranks != ranks.place.ranks {
        return Some(Error::config(
            format!("{ours} is one of {} ranks, and {theirs} is one of {}", ranks.place.ranks, hello.ranks),
            "start all ranks with one launcher",
        ));
    }
    let other = match present.get(&hello.rank) {
        _ if hello.rank == 0 => host(),
        Some(other) => other.host.clone(),
        None if hello.rank < ranks.place.ranks => return None,
        None => {
            return Some(Error::config(
                format!("{theirs} is beyond the number of ranks"),
                "start all ranks with one launcher",
            ));
        }
    };
    Some(Error::config(
        format!("there are two processes of rank {}, on {other} and on {}", hello.rank, hello.host),
        "give each process its own rank: start all ranks with one launcher",
    ))
}

/// What this process says of itself to rank 0.
pub fn hello(ranks: &Ranks) -> Hello {
    Hello {
        greeting: GREETING.to_string(),
        version: env!("CARGO_PKG_VERSION").to_string(),
        job: ranks.job.clone(),
        rank: ranks.place.rank,
        ranks: ranks.place.ranks,
        host: host(),
    }
}

/// Every other rank: comes to rank 0.
pub fn connect(ranks: &Ranks, limits: Limits, deadline: Instant) -> Result<Connected> {
    connect_as(&hello(ranks), ranks, limits, deadline)
}

/// As [`connect`], saying `hello`.
pub fn connect_as(hello: &Hello, ranks: &Ranks, limits: Limits, deadline: Instant) -> Result<Connected> {
    let address = &ranks.address;
    loop {
        interrupt::check()?;
        let why = match reach(address).and_then(|stream| greet(ranks, hello, stream)) {
            Ok(result) => return result,
            Err(error) => error,
        };
        if Instant::now() >= deadline {
            return Err(Error::rank(
                format!(
                    "rank {} on {} cannot reach rank 0 at {address} within {} s: {why}",
                    ranks.place.rank,
                    host(),
                    limits.join.as_secs()
                ),
                format!(
                    "look at the output of rank 0, and whether this machine reaches that port (firewall); {} chooses another \
                     port, {} a longer time",
                    variable::PORT,
                    variable::JOIN
                ),
            ));
        }
        std::thread::sleep(2 * LOOK);
    }
}

fn reach(address: &Address) -> std::io::Result<TcpStream> {
    let mut last = IoError::new(ErrorKind::NotFound, "the host has no address");
    for address in (address.host.as_str(), address.port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, FIRST_WORDS) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The outer error may pass with time; the inner one is rank 0's refusal, which is final.
fn greet(ranks: &Ranks, hello: &Hello, mut stream: TcpStream) -> std::io::Result<Result<Connected>> {
    let reader = prepare(&stream)?;
    messages::send(&mut stream, &Message::Hello(hello.clone()))?;
    match read_first(&reader)? {
        Some(Message::Welcome(host)) => Ok(Ok(Connected { rank: 0, host, stream, reader })),
        Some(Message::Refused(why)) => Ok(Err(Error::rank(
            format!("rank 0 at {} does not take this process for one of its ranks: {why}", ranks.address),
            "start all ranks with one launcher, of one version of the program",
        ))),
        _ => Err(IoError::new(ErrorKind::InvalidData, "whoever listens there is not rank 0")),
    }
}

/// Sets what holds for all connections; returns the reading half.
fn prepare(stream: &TcpStream) -> std::io::Result<TcpStream> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(WRITE))?;
    stream.try_clone()
}

/// Reads one message byte by byte, so that none of the next one is taken.
fn read_first(stream: &TcpStream) -> std::io::Result<Option<Message>> {
    stream.set_read_timeout(Some(FIRST_WORDS))?;
    let mut reader = BufReader::with_capacity(1, stream.try_clone()?);
    let message = messages::receive(&mut reader)?;
    stream.set_read_timeout(None)?;
    Ok(message)
}

pub(super) fn listen(ranks: &Ranks) -> Result<TcpListener> {
    let port = ranks.address.port;
    // Where all ranks are on this machine, nothing from outside may connect.
    let bind = || match ranks.is_one_machine() {
        true => TcpListener::bind((Ipv4Addr::LOCALHOST, port)),
        false => TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
            .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))),
    };
    let deadline = Instant::now() + BIND;
    loop {
        match bind() {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < deadline => {
                interrupt::check()?;
                std::thread::sleep(4 * LOOK);
            }
            Err(error) => return Err(cannot_listen(&ranks.address, error)),
        }
    }
}

fn cannot_listen(address: &Address, cause: IoError) -> Error {
    Error::Io {
        path: Path::new(&format!("port {} of this machine", address.port)).to_path_buf(),
        action: "listen for the other ranks on",
        cause,
        help: format!("set {} to a port that is free, the same for all ranks", variable::PORT),
    }
}
