//! Connections of programs in the guest.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::world::{FAR, FAR6, PATIENCE, World, exchange, options};

#[test]
fn a_connection_carries_both_directions_and_each_ends_on_its_own() {
    let Some(world) = World::start(options(&["any"])) else { return };
    for far in [format!("{FAR}:7000"), format!("[{FAR6}]:7000")] {
        world.serve_far(&far);
        let stream = world.connect(&far).unwrap();
        assert_eq!(exchange(&stream, b"the client ends first").unwrap(), b"the client ends first");

        // The server ends first, and goes on listening.
        let at: SocketAddr = far.replace("7000", "7001").parse().unwrap();
        let listener = world.far.inside(|| TcpListener::bind(at).unwrap());
        let server = std::thread::spawn(move || {
            let (mut server, client) = listener.accept().unwrap();
            server.write_all(b"bye").unwrap();
            server.shutdown(Shutdown::Write).unwrap();
            let mut heard = Vec::new();
            server.read_to_end(&mut heard).unwrap();
            (heard, client)
        });
        let mut stream = world.connect(&at.to_string()).unwrap();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).unwrap();
        assert_eq!(heard, b"bye");
        std::thread::sleep(Duration::from_millis(50));
        stream.write_all(b"not yet, ").unwrap();
        stream.write_all(b"but now").unwrap();
        drop(stream);
        let (heard, client) = server.join().unwrap();
        assert_eq!(heard, b"not yet, but now");
        assert_ne!(client.ip().to_string(), "192.0.0.2", "the world sees the host");
    }
    let counters = world.gateway.counters();
    assert_eq!((counters.connections, counters.denied_connections), (4, 0));
}

/// Bytes of which every stretch differs from what is before and behind it.
fn pattern() -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..1_000_003).map(|_| next()).collect()
}

fn send_pattern(mut stream: &TcpStream, mut left: usize) {
    let pattern = pattern();
    while left > 0 {
        let piece = &pattern[..left.min(pattern.len())];
        stream.write_all(piece).unwrap();
        left -= piece.len();
    }
    stream.shutdown(Shutdown::Write).unwrap();
}

/// How many bytes came; all of them as they were sent.
fn receive_pattern(mut stream: &TcpStream) -> usize {
    let pattern = pattern();
    let (mut received, mut piece) = (0, vec![0; 256 << 10]);
    loop {
        let length = stream.read(&mut piece).unwrap();
        if length == 0 {
            return received;
        }
        let mut rest = &piece[..length];
        while !rest.is_empty() {
            let at = received % pattern.len();
            let same = rest.len().min(pattern.len() - at);
            assert!(rest[..same] == pattern[at..at + same], "wrong bytes after {received}");
            rest = &rest[same..];
            received += same;
        }
    }
}

#[test]
fn a_gigabyte_each_way_at_once_arrives_as_it_was_sent() {
    const AMOUNT: usize = 1 << 30;
    let Some(world) = World::start(options(&["any"])) else { return };
    let at: SocketAddr = format!("{FAR}:7000").parse().unwrap();
    let listener = world.far.inside(|| TcpListener::bind(at).unwrap());
    let both_ways = |stream: TcpStream| {
        let sender = stream.try_clone().unwrap();
        let sending = std::thread::spawn(move || send_pattern(&sender, AMOUNT));
        let received = receive_pattern(&stream);
        sending.join().unwrap();
        received
    };
    let server = std::thread::spawn(move || both_ways(listener.accept().unwrap().0));
    assert_eq!(both_ways(world.connect(&at.to_string()).unwrap()), AMOUNT);
    assert_eq!(server.join().unwrap(), AMOUNT);
    crate::lab::wait_for("the numbers", || world.gateway.counters().sent == AMOUNT as u64);
    assert_eq!(world.gateway.counters().received, AMOUNT as u64);
}

#[test]
fn a_program_is_told_why_its_connection_was_not_made() {
    let Some(world) = World::start(options(&["10.0.0.0/8", "fd00::/8", "198.51.100.0/24"])) else { return };
    for container in [&world.guest, &world.far] {
        let once = || std::fs::write("/proc/sys/net/ipv4/tcp_syn_retries", "2").unwrap();
        container.inside(once);
    }
    std::fs::write("/proc/sys/net/ipv4/tcp_syn_retries", "2").unwrap();
    crate::lab::ip("route add 10.78.0.0/16 via 10.77.0.2");
    let failure = |to: &str| {
        let to: SocketAddr = to.parse().unwrap();
        let began = Instant::now();
        // With the kernel's own patience: a time-out must be its word.
        let error = world.guest.inside(|| TcpStream::connect(to)).unwrap_err();
        (error.kind(), began.elapsed())
    };
    // Before the kernel would give up, which is after seven seconds.
    let quick = Duration::from_secs(5);
    for (to, kind, most) in [
        (format!("{FAR}:9"), ErrorKind::ConnectionRefused, quick),
        (format!("[{FAR6}]:9"), ErrorKind::ConnectionRefused, quick),
        ("198.51.100.1:80".into(), ErrorKind::NetworkUnreachable, quick),
        ("[fd99::1]:80".into(), ErrorKind::NetworkUnreachable, quick),
        // Not allowed.
        ("192.0.2.1:80".into(), ErrorKind::ConnectionRefused, quick),
        ("169.254.169.254:80".into(), ErrorKind::ConnectionRefused, quick),
        // Nobody there: the host's kernel asks for the neighbour three times.
        ("10.77.0.99:80".into(), ErrorKind::HostUnreachable, Duration::from_secs(6)),
        ("[fd77::99]:80".into(), ErrorKind::HostUnreachable, Duration::from_secs(6)),
        ("10.78.0.1:80".into(), ErrorKind::TimedOut, Duration::from_secs(12)),
    ] {
        let (told, took) = failure(&to);
        assert_eq!(told, kind, "{to} after {took:?}");
        assert!(took < most, "{to}: {took:?}");
    }
    assert_eq!(world.gateway.counters().denied_connections, 2);
}

#[test]
fn a_reset_of_either_end_is_a_reset_for_the_other() {
    let Some(world) = World::start(options(&["any"])) else { return };
    let at: SocketAddr = format!("{FAR}:7000").parse().unwrap();
    let listener = world.far.inside(|| TcpListener::bind(at).unwrap());
    let linger = |stream: &TcpStream| {
        rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO)).unwrap();
    };

    let mut client = world.connect(&at.to_string()).unwrap();
    let (server, _) = listener.accept().unwrap();
    linger(&server);
    drop(server);
    assert_eq!(client.read(&mut [0; 10]).unwrap_err().kind(), ErrorKind::ConnectionReset);

    let client = world.connect(&at.to_string()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    linger(&client);
    drop(client);
    assert_eq!(server.read(&mut [0; 10]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_thousand_connections_are_served_at_once() {
    const MANY: usize = 1000;
    let limit = rustix::process::Resource::Nofile;
    let most = rustix::process::getrlimit(limit).maximum;
    rustix::process::setrlimit(limit, rustix::process::Rlimit { current: most, maximum: most }).unwrap();
    let Some(world) = World::start(options(&["any"])) else { return };
    let at: SocketAddr = format!("{FAR}:7000").parse().unwrap();
    let listener = world.far.inside(|| {
        std::fs::write("/proc/sys/net/core/somaxconn", "4096").unwrap();
        let listener = TcpListener::bind(at).unwrap();
        rustix::net::listen(&listener, 4096).unwrap();
        listener
    });
    let server = std::thread::spawn(move || {
        let mut all: Vec<TcpStream> = (0..MANY).map(|_| listener.accept().unwrap().0).collect();
        for connection in &mut all {
            let mut asked = [0; 8];
            connection.read_exact(&mut asked).unwrap();
            connection.write_all(&asked).unwrap();
        }
        all
    });
    let mut clients: Vec<TcpStream> = std::thread::scope(|scope| {
        let connecting: Vec<_> = (0..10)
            .map(|_| {
                scope.spawn(|| {
                    let connect =
                        || (0..MANY / 10).map(|_| TcpStream::connect(at).unwrap()).collect::<Vec<_>>();
                    world.guest.inside(connect)
                })
            })
            .collect();
        connecting.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    for (number, client) in clients.iter_mut().enumerate() {
        client.write_all(&number.to_be_bytes()).unwrap();
    }
    for (number, client) in clients.iter_mut().enumerate() {
        let mut answer = [0; 8];
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.read_exact(&mut answer).unwrap();
        assert_eq!(usize::from_be_bytes(answer), number);
    }
    assert_eq!(server.join().unwrap().len(), MANY);
    drop(clients);
    // None is left over: as many again are no trouble for a gateway that lets as many through.
    assert_eq!(world.gateway.counters().connections, MANY as u64);
}

#[test]
fn another_session_resets_what_went_through_the_last_and_serves_what_comes() {
    let Some(world) = World::start(options(&["any"])) else { return };
    let far = format!("{FAR}:7000");
    world.serve_far(&far);
    crate::lab::ip("route add 10.78.0.0/16 via 10.77.0.2");
    let socket = world.datagrams(&far);
    assert_eq!(crate::world::ask(&socket, b"before").unwrap(), b"before");
    let mut open = world.connect(&far).unwrap();
    open.write_all(b"half a question").unwrap();
    let dialling = std::thread::scope(|scope| {
        let dialling = scope.spawn(|| world.connect("10.78.0.1:80"));
        std::thread::sleep(Duration::from_millis(300));
        world.renew();
        dialling.join().unwrap()
    });
    assert_eq!(dialling.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(open.read(&mut [0; 10]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    let again = world.connect(&far).unwrap();
    assert_eq!(exchange(&again, b"whole question").unwrap(), b"whole question");
    assert_eq!(crate::world::ask(&socket, b"after").unwrap(), b"after");
}

#[test]
fn the_host_stops_dialling_for_a_program_that_has_given_up() {
    let mut one = options(&["any"]);
    one.limits.connections = 1;
    let Some(world) = World::start(one) else { return };
    let far = format!("{FAR}:7000");
    world.serve_far(&far);
    crate::lab::ip("route add 10.78.0.0/16 via 10.77.0.2");
    let nowhere: SocketAddr = "10.78.0.1:80".parse().unwrap();
    let connect = || TcpStream::connect_timeout(&nowhere, Duration::from_millis(200));
    assert_eq!(world.guest.inside(connect).unwrap_err().kind(), ErrorKind::TimedOut);
    assert_eq!(world.connect(&far).unwrap_err().kind(), ErrorKind::ConnectionRefused, "it still dials");
    crate::lab::wait_for("the end of the dialling", || {
        std::thread::sleep(Duration::from_millis(500));
        let answer = world.connect(&far).and_then(|stream| exchange(&stream, b"free"));
        answer.is_ok_and(|answer: Vec<u8>| answer == b"free")
    });
    assert!(world.gateway.counters().over_limit > 0);
}

#[test]
fn a_slow_reader_slows_its_sender_and_nobody_else() {
    let Some(world) = World::start(options(&["any"])) else { return };
    let far = format!("{FAR}:7000");
    world.serve_far(&far);
    let at: SocketAddr = format!("{FAR}:7001").parse().unwrap();
    let listener = world.far.inside(|| TcpListener::bind(at).unwrap());
    let mut client = world.connect(&at.to_string()).unwrap();
    client.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let piece = vec![0; 1 << 20];
    let mut sent = 0;
    let full: io::Error = loop {
        match client.write(&piece) {
            Ok(written) => sent += written,
            Err(error) => break error,
        }
        assert!(sent < 256 << 20, "nothing holds the sender back");
    };
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
    let other = world.connect(&far).unwrap();
    assert_eq!(exchange(&other, b"unhindered").unwrap(), b"unhindered");
    drop(client);
    let mut received = 0;
    let mut piece = vec![0; 1 << 20];
    loop {
        match server.read(&mut piece).unwrap() {
            0 => break,
            read => received += read,
        }
    }
    assert_eq!(received, sent);
}
