//! Bridge networks, with real namespaces, interfaces and rules.

#![cfg(target_os = "linux")]

mod lab;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use kiln_contract::{
    ErrorKind, Home, InstanceId, NetworkBackend, NetworkRequest, NetworkSpec, Protocol, PublishSpec,
};
use kiln_net::{ContainerNetwork, NetworkOptions, Networks, traffic};
use lab::{Container, Lab, Supervisor, address, ip, run, state_of_host, wait_for};

const PATIENCE: Duration = Duration::from_secs(3);

fn publish(host_port: u16, container_port: u16, protocol: Protocol) -> PublishSpec {
    PublishSpec { host_address: None, host_port, host_port_last: None, container_port, protocol }
}

/// Answers every connection and datagram at `port` inside with `name`.
fn serve(container: &Container, port: u16, name: &'static str) {
    let (tcp, udp) = container.inside(|| {
        (TcpListener::bind(("0.0.0.0", port)).unwrap(), UdpSocket::bind(("0.0.0.0", port)).unwrap())
    });
    std::thread::spawn(move || {
        for connection in tcp.incoming() {
            let Ok(mut connection) = connection else { return };
            let mut asked = Vec::new();
            // Reads to the end: the closing of one direction must reach the other end.
            let _ = connection.read_to_end(&mut asked);
            asked.extend_from_slice(name.as_bytes());
            let _ = connection.write_all(&asked);
        }
    });
    std::thread::spawn(move || {
        let mut asked = [0; 1500];
        while let Ok((length, client)) = udp.recv_from(&mut asked) {
            let answer = [&asked[..length], name.as_bytes()].concat();
            let _ = udp.send_to(&answer, client);
        }
    });
}

fn fetch(to: impl Into<SocketAddr>) -> Option<String> {
    let mut connection = TcpStream::connect_timeout(&to.into(), PATIENCE).ok()?;
    connection.set_read_timeout(Some(PATIENCE)).unwrap();
    connection.write_all(b"hello ").ok()?;
    connection.shutdown(std::net::Shutdown::Write).ok()?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).ok()?;
    (!answer.is_empty()).then_some(answer)
}

fn exchange(to: impl Into<SocketAddr>) -> Option<String> {
    let to = to.into();
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    // Connected: an answer from another address than the one asked is no answer.
    socket.connect(to).ok()?;
    socket.send(b"hello ").ok()?;
    let mut answer = [0; 100];
    let length = socket.recv(&mut answer).ok()?;
    Some(String::from_utf8_lossy(&answer[..length]).into_owned())
}

#[test]
fn neighbours_reach_each_other_by_address_and_by_name_and_leave_nothing_behind() {
    let Some(lab) = Lab::enter() else { return };
    // What others have made must not be touched.
    ip("link add name br-other type bridge");
    ip("addr add 10.89.0.1/24 dev br-other");
    ip("link set br-other up");
    run("nft add table inet other");
    run("nft add chain inet other forward { type filter hook forward priority 10 ; policy accept ; }");
    run("nft add rule inet other forward tcp dport 1 drop");
    run("nft add table ip nat");
    run("nft add chain ip nat POSTROUTING { type nat hook postrouting priority 100 ; }");
    let before = state_of_host();

    let (mut web, mut db) = (Container::start(), Container::start());
    let mut networks = [lab.network(), lab.network()];
    let first = web.connect(&mut networks[0], "web", "default", &[]);
    let request = NetworkRequest {
        network: NetworkSpec {
            mode: "kiln".into(),
            aliases: vec!["storage".into()],
            add_hosts: vec!["up:host-gateway".into()],
            ..NetworkSpec::default()
        },
        ..db.request("db", "kiln")
    };
    let second = networks[1].setup(&request).unwrap();
    assert_ne!(state_of_host(), before);
    assert_ne!(address(&first), address(&second));
    assert_eq!(networks[0].address(&db.id).unwrap(), second.addresses, "any process can tell the address");

    serve(&db, 5432, "db");
    let to = SocketAddr::new(address(&second), 5432);
    assert_eq!(web.inside(|| fetch(to)).as_deref(), Some("hello db"));
    assert_eq!(web.inside(|| exchange(to)).as_deref(), Some("hello db"));
    assert_eq!(fetch(to).as_deref(), Some("hello db"), "the host reaches its containers");
    let (received, sent) = traffic(db.pid()).unwrap();
    assert!(received > 200 && sent > 200, "{received} {sent}");

    for name in ["db", "DB", "storage", "db-host", db.id.short(), "db.kiln.internal"] {
        let answer = web.run(&format!("busybox nslookup -type=a {name} 127.0.0.11")).unwrap();
        assert!(answer.contains(&format!("Address: {}", address(&second))), "{name}: {answer}");
    }
    let reverse = web.run(&format!("busybox nslookup {} 127.0.0.11", address(&second))).unwrap();
    assert!(reverse.contains("db"), "{reverse}");
    assert!(web.run("busybox nslookup -type=a nobody.kiln.internal 127.0.0.11").is_none());
    let over_tcp = web.inside(|| query_over_tcp("db"));
    let IpAddr::V4(db_address) = address(&second) else { panic!("not IPv4") };
    assert!(over_tcp.ends_with(&db_address.octets()), "{over_tcp:?}");
    // The C library, with the file that was given.
    let file = lab.home.path().join("resolv.conf");
    std::fs::write(&file, first.resolv_conf.as_deref().unwrap()).unwrap();
    let script = format!("mount --bind {} /etc/resolv.conf && getent hosts storage", lab::display(&file));
    let found = Command::new("nsenter")
        .args(["-t", &web.pid().to_string(), "-n", "unshare", "--mount", "sh", "-c", &script])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&found.stdout).starts_with(&address(&second).to_string()), "{found:?}");
    let hosts = second.hosts.clone().unwrap();
    assert!(hosts.contains(&format!("{}\tdb-host db\n", address(&second))), "{hosts}");
    let gateway = Networks::open(&lab.home).find("kiln").unwrap().gateway.unwrap();
    assert!(hosts.contains(&format!("{gateway}\tup\n")), "{hosts}");

    assert_eq!(Networks::open(&lab.home).remove("kiln").unwrap_err().kind(), ErrorKind::Invalid);
    networks[0].teardown(&web.id).unwrap();
    web.end();
    let gone = db.run("busybox nslookup -type=a web.kiln.internal 127.0.0.11");
    assert!(gone.is_none(), "a name outlived its container: {gone:?}");
    networks[1].teardown(&db.id).unwrap();
    networks[1].teardown(&db.id).unwrap();
    db.end();
    assert_eq!(state_of_host(), before);
    assert!(Networks::open(&lab.home).find("kiln").unwrap().leases.is_empty());
}

/// The answer to a query for an address, over TCP.
fn query_over_tcp(name: &str) -> Vec<u8> {
    let mut query = vec![0, 9, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, name.len() as u8];
    query.extend_from_slice(name.as_bytes());
    query.extend_from_slice(&[0, 0, 1, 0, 1]);
    let mut connection = TcpStream::connect("127.0.0.11:53").unwrap();
    connection.write_all(&(query.len() as u16).to_be_bytes()).unwrap();
    connection.write_all(&query).unwrap();
    let mut length = [0; 2];
    connection.read_exact(&mut length).unwrap();
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    connection.read_exact(&mut answer).unwrap();
    answer
}

/// A machine beside the host, at 198.51.100.2, while the host is at 198.51.100.1.
fn machine_outside() -> Container {
    let outside = Container::start();
    ip(&format!("link add out0 type veth peer name eth0 netns {}", outside.pid()));
    ip("addr add 198.51.100.1/24 dev out0");
    ip("link set out0 up");
    for line in ["ip addr add 198.51.100.2/24 dev eth0", "ip link set eth0 up", "ip link set lo up"] {
        outside.run(line).unwrap();
    }
    outside
}

#[test]
fn published_ports_are_reached_from_everywhere() {
    let Some(lab) = Lab::enter() else { return };
    let outside = machine_outside();
    let before = state_of_host();
    let (web, client) = (Container::start(), Container::start());
    let mut network = lab.network();
    let at = |address: &str, host_port| PublishSpec {
        host_address: Some(address.parse().unwrap()),
        ..publish(host_port, 80, Protocol::Tcp)
    };
    let asked = [
        publish(8080, 80, Protocol::Tcp),
        publish(8080, 80, Protocol::Udp),
        publish(0, 80, Protocol::Tcp),
        at("127.0.0.1", 8081),
        at("198.51.100.1", 8082),
    ];
    let attachment = web.connect(&mut network, "web", "kiln", &asked);
    client.connect(&mut network, "client", "kiln", &[]);
    serve(&web, 80, "web");
    let chosen = attachment.ports[2].host_port;
    assert!(chosen != 0 && attachment.ports[0] == asked[0]);

    let table: [(&str, u16, bool, bool); 9] = [
        ("127.0.0.1", 8080, true, false),
        ("::1", 8080, true, false),
        ("198.51.100.1", 8080, true, true),
        ("198.51.100.1", chosen, true, true),
        ("127.0.0.1", chosen, true, false),
        ("127.0.0.1", 8081, true, false),
        ("198.51.100.1", 8081, false, false),
        ("198.51.100.1", 8082, true, true),
        ("127.0.0.1", 8082, false, false),
    ];
    for (address, port, from_host, from_elsewhere) in table {
        let to = SocketAddr::new(address.parse().unwrap(), port);
        let reached = |yes: bool| yes.then(|| "hello web".to_owned());
        assert_eq!(fetch(to), reached(from_host), "the host to {to}");
        if !to.ip().is_loopback() {
            assert_eq!(outside.inside(|| fetch(to)), reached(from_elsewhere), "outside to {to}");
            assert_eq!(client.inside(|| fetch(to)), reached(from_elsewhere), "a neighbour to {to}");
            assert_eq!(web.inside(|| fetch(to)), reached(from_elsewhere), "itself to {to}");
        }
    }
    for address in ["127.0.0.1", "::1", "198.51.100.1"] {
        let to = SocketAddr::new(address.parse().unwrap(), 8080);
        assert_eq!(exchange(to).as_deref(), Some("hello web"), "UDP to {to}");
    }
    let to: SocketAddr = "198.51.100.1:8080".parse().unwrap();
    assert_eq!(outside.inside(|| exchange(to)).as_deref(), Some("hello web"));
    // Much, and both ways at once, through the proxy.
    assert_eq!(echo_much("127.0.0.1:8080"), 8 << 20);

    let later = network.publish(&web.id, &publish(0, 80, Protocol::Tcp)).unwrap();
    let to = SocketAddr::new("198.51.100.1".parse().unwrap(), later.host_port);
    assert_eq!(outside.inside(|| fetch(to)).as_deref(), Some("hello web"));

    network.teardown(&web.id).unwrap();
    assert!(fetch(SocketAddr::from(([127, 0, 0, 1], 8080))).is_none());
    network.teardown(&client.id).unwrap();
    assert_eq!(state_of_host(), before);
}

/// Sends 8 MiB to a server that gives back what it got and 3 bytes more; how many came back of what was sent.
fn echo_much(to: &str) -> usize {
    let mut connection = TcpStream::connect(to).unwrap();
    connection.set_read_timeout(Some(PATIENCE)).unwrap();
    let sent: Vec<u8> = (0..8u32 << 20).map(|n| (n % 251) as u8).collect();
    connection.write_all(&sent).unwrap();
    connection.shutdown(std::net::Shutdown::Write).unwrap();
    let mut back = Vec::new();
    connection.read_to_end(&mut back).unwrap();
    assert!(back.starts_with(&sent) && back.ends_with(b"web"));
    back.len() - 3
}

#[test]
fn a_port_that_is_in_use_is_a_conflict_that_names_it_and_changes_nothing() {
    let Some(lab) = Lab::enter() else { return };
    let before = state_of_host();
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = other.local_addr().unwrap().port();
    let (container, mut network) = (Container::start(), lab.network());
    let request = NetworkRequest {
        ports: vec![publish(0, 80, Protocol::Udp), publish(port, 80, Protocol::Tcp)],
        ..container.request("web", "kiln")
    };
    let error = network.setup(&request).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(
        error.to_string().contains(&format!("port {port}/tcp")) && error.hint_text().is_some(),
        "{error}"
    );
    assert_eq!(state_of_host(), before);

    // The same between two containers, of two supervisors.
    let port =
        container.connect(&mut network, "web", "kiln", &[publish(0, 80, Protocol::Tcp)]).ports[0].host_port;
    let (second, mut others) = (Container::start(), lab.network());
    let request =
        NetworkRequest { ports: vec![publish(port, 80, Protocol::Tcp)], ..second.request("second", "kiln") };
    assert_eq!(others.setup(&request).unwrap_err().kind(), ErrorKind::Conflict);
    assert!(others.address(&second.id).unwrap().is_empty());
    network.teardown(&container.id).unwrap();
    assert_eq!(state_of_host(), before);
}

#[test]
fn networks_are_walls_and_internal_ones_have_no_gate() {
    let Some(lab) = Lab::enter() else { return };
    let outside = machine_outside();
    let before = state_of_host();
    let networks = Networks::open(&lab.home);
    networks.create("front", &NetworkOptions::default()).unwrap();
    networks.create("vault", &NetworkOptions { internal: true, ..NetworkOptions::default() }).unwrap();
    let (a, b, c, d) = (Container::start(), Container::start(), Container::start(), Container::start());
    let mut network = lab.network();
    let a_address = address(&a.connect(&mut network, "a", "kiln", &[]));
    let b_address = address(&b.connect(&mut network, "b", "front", &[publish(8000, 80, Protocol::Tcp)]));
    let c_address = address(&c.connect(&mut network, "c", "vault", &[]));
    let d_address = address(&d.connect(&mut network, "d", "vault", &[]));
    for (container, name) in [(&a, "a"), (&b, "b"), (&c, "c"), (&d, "d"), (&outside, "outside")] {
        serve(container, 80, name);
    }
    // The way to the containers is known outside, as it would be to a neighbour in the same network segment.
    outside.run("ip route add 10.0.0.0/8 via 198.51.100.1").unwrap();
    let outside_address: IpAddr = "198.51.100.2".parse().unwrap();
    let table: [(&Container, &str, IpAddr, u16, Option<&str>); 11] = [
        (&a, "kiln to outside", outside_address, 80, Some("hello outside")),
        (&b, "front to outside", outside_address, 80, Some("hello outside")),
        (&c, "vault to outside", outside_address, 80, None),
        (&a, "kiln to front", b_address, 80, None),
        (&b, "front to kiln", a_address, 80, None),
        (&a, "kiln to vault", c_address, 80, None),
        (&c, "vault to kiln", a_address, 80, None),
        (&c, "vault to itself", d_address, 80, Some("hello d")),
        (&outside, "outside to kiln", a_address, 80, None),
        (&outside, "outside to vault", c_address, 80, None),
        (&a, "kiln to what front publishes", "198.51.100.1".parse().unwrap(), 8000, Some("hello b")),
    ];
    std::thread::scope(|scope| {
        for (from, what, to, port, expected) in table {
            scope.spawn(move || {
                let answer = from.inside(|| fetch(SocketAddr::new(to, port)));
                assert_eq!(answer.as_deref(), expected, "{what}");
            });
        }
    });
    assert!(
        a.run("busybox nslookup -type=a b.kiln.internal 127.0.0.11").is_none(),
        "a name crossed the wall"
    );
    let e = Container::start();
    let request = NetworkRequest { ports: vec![publish(0, 80, Protocol::Tcp)], ..e.request("e", "vault") };
    assert_eq!(network.setup(&request).unwrap_err().kind(), ErrorKind::Unsupported);
    for container in [&a, &b, &c, &d] {
        network.teardown(&container.id).unwrap();
    }
    assert_eq!(networks.prune().unwrap(), ["front", "vault"]);
    assert_eq!(state_of_host(), before);
}

#[test]
fn other_names_are_forwarded_and_a_dead_name_server_is_passed_over() {
    let Some(lab) = Lab::enter() else { return };
    // A name server that answers every query with the same bytes behind the query's number.
    let server = UdpSocket::bind("127.0.0.53:53").unwrap();
    std::thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((length, client)) = server.recv_from(&mut query) {
            query[2] |= 0x80;
            query[7] = 1;
            let answer =
                [&query[..length], &[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 203, 0, 113, 7]].concat();
            let _ = server.send_to(&answer, client);
        }
    });
    let (container, mut network) = (Container::start(), lab.network());
    let mut request = container.request("web", "kiln");
    request.network.dns = vec!["127.0.0.99".parse().unwrap(), "127.0.0.53".parse().unwrap()];
    request.network.dns_search = vec!["example.org".into()];
    let attachment = network.setup(&request).unwrap();
    assert_eq!(
        attachment.resolv_conf.unwrap().lines().take(2).collect::<Vec<_>>(),
        ["nameserver 127.0.0.11", "search example.org"]
    );
    let answer = container.run("busybox nslookup -type=a other.example 127.0.0.11").unwrap();
    assert!(answer.contains("203.0.113.7"), "{answer}");
    network.teardown(&container.id).unwrap();
}

#[test]
fn a_container_that_serves_names_has_port_53_to_itself() {
    let Some(lab) = Lab::enter() else { return };
    let (container, mut network) = (Container::start(), lab.network());
    let mut request = container.request("names", "kiln");
    request.ports = vec![publish(5353, 53, Protocol::Udp)];
    request.network.dns = vec!["203.0.113.53".parse().unwrap()];
    let attachment = network.setup(&request).unwrap();
    assert!(attachment.resolv_conf.unwrap().starts_with("nameserver 203.0.113.53\n"));
    serve(&container, 53, "names");
    assert_eq!(exchange(SocketAddr::from(([127, 0, 0, 1], 5353))).as_deref(), Some("hello names"));
    network.teardown(&container.id).unwrap();
}

#[test]
fn the_doctor_tells_who_can_make_bridges() {
    let Some(_lab) = Lab::enter() else { return };
    let verdict = |what: &str| kiln_net::doctor().into_iter().find(|(name, ..)| name == what).unwrap();
    assert!(verdict("bridge").1, "{:?}", verdict("bridge"));
    assert!(verdict("nft").2.contains("/nft"));
}

#[test]
fn what_a_killed_supervisor_left_is_taken_away_by_another_process() {
    let Some(lab) = Lab::enter() else { return };
    let before = state_of_host();
    let mut container = Container::start();
    let mut command = Command::new(Supervisor::program());
    command.args([lab.home.path().to_str().unwrap(), "kiln", &container.pid().to_string(), "web"]);
    command.args([container.id.as_str(), "80"]);
    let mut supervisor = Supervisor::start(command);
    serve(&container, 80, "web");
    let port = supervisor.told["ports"][0]["host_port"].as_u64().unwrap() as u16;
    assert_eq!(fetch(SocketAddr::from(([127, 0, 0, 1], port))).as_deref(), Some("hello web"));
    assert!(run("nft list ruleset").contains(container.id.as_str()), "rules name their container");

    supervisor.child.kill().unwrap();
    supervisor.child.wait().unwrap();
    // Another container may have the port at once, whatever the dead one's lease says.
    let (second, mut network) = (Container::start(), lab.network());
    second.connect(&mut network, "second", "kiln", &[publish(port, 80, Protocol::Tcp)]);
    serve(&second, 80, "second");
    assert_eq!(fetch(SocketAddr::from(([127, 0, 0, 1], port))).as_deref(), Some("hello second"));
    // The namespace goes first, and the kernel takes the interfaces with it.
    container.end();
    lab.network().teardown(&container.id).unwrap();
    assert!(!run("nft list ruleset").contains(container.id.as_str()));
    assert_eq!(fetch(SocketAddr::from(([127, 0, 0, 1], port))).as_deref(), Some("hello second"));
    network.teardown(&second.id).unwrap();
    assert_eq!(state_of_host(), before);
}

#[test]
fn a_supervisor_killed_at_any_instant_leaves_nothing_that_cannot_be_taken_away() {
    let Some(lab) = Lab::enter() else { return };
    let before = state_of_host();
    for instant in 0..16 {
        let container = Container::start();
        let mut supervisor = Command::new(Supervisor::program())
            .args([lab.home.path().to_str().unwrap(), "kiln", &container.pid().to_string(), "web"])
            .args([container.id.as_str(), "80"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // The instants are spread over a connection's first 30 ms; where each falls is up to the machine.
        std::thread::sleep(Duration::from_millis(instant * 2));
        supervisor.kill().unwrap();
        supervisor.wait().unwrap();
        lab.network().teardown(&container.id).unwrap();
        assert_eq!(state_of_host(), before, "killed after {} ms", instant * 2);
    }
}

#[test]
fn rules_and_bridges_that_somebody_removed_are_made_again() {
    let Some(lab) = Lab::enter() else { return };
    let outside = machine_outside();
    serve(&outside, 80, "outside");
    let before = state_of_host();
    let (a, b) = (Container::start(), Container::start());
    let mut network = lab.network();
    a.connect(&mut network, "a", "kiln", &[publish(8000, 80, Protocol::Tcp)]);
    serve(&a, 80, "a");
    run("nft flush ruleset");
    b.connect(&mut network, "b", "kiln", &[]);
    let to: SocketAddr = "198.51.100.1:8000".parse().unwrap();
    assert_eq!(
        outside.inside(|| fetch(to)).as_deref(),
        Some("hello a"),
        "the first one's ports are back too"
    );
    let to: SocketAddr = "198.51.100.2:80".parse().unwrap();
    assert_eq!(b.inside(|| fetch(to)).as_deref(), Some("hello outside"));
    let bridge = Networks::open(&lab.home).find("kiln").unwrap().interface;
    run("nft flush ruleset");
    ip(&format!("link del {bridge}"));
    network.teardown(&a.id).unwrap();
    network.teardown(&b.id).unwrap();
    assert_eq!(state_of_host(), before);
}

#[test]
fn subnets_avoid_what_the_host_and_other_homes_have() {
    let Some(lab) = Lab::enter() else { return };
    ip("link add name wan0 type bridge");
    ip("addr add 10.89.1.1/23 dev wan0");
    ip("link set wan0 up");
    ip("route add 10.90.0.0/15 dev wan0");
    let networks = Networks::open(&lab.home);
    let other = Home::at(tempfile::tempdir().unwrap().keep());
    let elsewhere = Networks::open(&other);
    let subnet = |networks: &Networks, name: &str, options: &NetworkOptions| {
        networks.create(name, options).map(|network| network.subnet.unwrap().to_string())
    };
    let any = NetworkOptions::default();
    let chosen: Vec<_> = (0..6)
        .map(|n| {
            let of = if n % 2 == 0 { &networks } else { &elsewhere };
            subnet(of, &format!("n{n}"), &any).unwrap()
        })
        .collect();
    for (n, subnet) in chosen.iter().enumerate() {
        assert!(subnet.starts_with("10.") && !chosen[..n].contains(subnet), "{chosen:?}");
        assert!(!["10.89.0.0/24", "10.89.1.0/24"].contains(&subnet.as_str()), "{chosen:?}");
    }
    let asked = |subnet: &str| NetworkOptions { subnet: Some(subnet.parse().unwrap()), ..any.clone() };
    for taken in ["10.90.5.0/24", "10.89.0.0/16", chosen[1].as_str()] {
        let error = subnet(&networks, "fixed", &asked(taken)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{taken}: {error}");
    }
    assert_eq!(subnet(&networks, "n0", &any).unwrap_err().kind(), ErrorKind::Conflict, "a name taken");
    assert_eq!(networks.find("fixed").unwrap_err().kind(), ErrorKind::NotFound);

    // A fixed subnet and a fixed address in it; in use, it stays.
    subnet(&networks, "fixed", &asked("172.31.77.0/24")).unwrap();
    let (container, mut network) = (Container::start(), lab.network());
    let mut request = container.request("web", "fixed");
    request.network.address = Some("172.31.77.9".parse().unwrap());
    assert_eq!(network.setup(&request).unwrap().addresses, ["172.31.77.9".parse::<IpAddr>().unwrap()]);
    assert_eq!(networks.remove("fixed").unwrap_err().kind(), ErrorKind::State);
    network.teardown(&container.id).unwrap();
    networks.remove("fixed").unwrap();

    // A route that came later: an unused network moves out of its way.
    ip(&format!("route add {} dev wan0", chosen[0]));
    let moved = address(&container.connect(&mut network, "web", "n0", &[]));
    assert!(!chosen[0].parse::<ipnet::IpNet>().unwrap().contains(&moved), "{moved} in {}", chosen[0]);
    network.teardown(&container.id).unwrap();
    std::fs::remove_dir_all(other.path()).unwrap();
}

#[test]
fn twenty_at_once_get_addresses_of_their_own() {
    let Some(lab) = Lab::enter() else { return };
    let before = state_of_host();
    let containers: Vec<_> = (0..20).map(|_| Container::start()).collect();
    let mut connected: Vec<(InstanceId, IpAddr, ContainerNetwork)> = std::thread::scope(|scope| {
        let started: Vec<_> = containers
            .iter()
            .enumerate()
            .map(|(n, container)| {
                let mut network = lab.network();
                scope.spawn(move || {
                    let ports = if n % 4 == 0 { vec![publish(0, 80, Protocol::Tcp)] } else { Vec::new() };
                    let name = format!("c{n}");
                    let attachment = container.connect(&mut network, &name, "default", &ports);
                    (container.id.clone(), address(&attachment), network)
                })
            })
            .collect();
        started.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut addresses: Vec<_> = connected.iter().map(|(_, address, _)| *address).collect();
    addresses.sort_unstable();
    addresses.dedup();
    assert_eq!(addresses.len(), 20);
    let last = &connected[19];
    serve(&containers[19], 80, "last");
    let to = SocketAddr::new(last.1, 80);
    assert_eq!(containers[0].inside(|| fetch(to)).as_deref(), Some("hello last"));
    std::thread::scope(|scope| {
        for (id, _, network) in &mut connected {
            scope.spawn(|| network.teardown(id).unwrap());
        }
    });
    assert_eq!(state_of_host(), before);
}

#[test]
fn none_has_loopback_only_and_host_has_all_of_the_host() {
    let Some(lab) = Lab::enter() else { return };
    let before = state_of_host();
    let (container, mut network) = (Container::start(), lab.network());
    let attachment = container.connect(&mut network, "web", "none", &[]);
    assert!(attachment.addresses.is_empty() && attachment.hosts.unwrap().contains("127.0.0.1\tweb-host web"));
    let links = container.run("ip -o link").unwrap();
    assert!(links.contains("lo: <LOOPBACK,UP") && !links.contains("eth0"), "{links}");
    network.teardown(&container.id).unwrap();

    let host = NetworkRequest { namespace: None, ..container.request("web", "host") };
    assert!(network.setup(&host).unwrap().resolv_conf.is_some());
    let none =
        NetworkRequest { ports: vec![publish(1, 1, Protocol::Tcp)], ..container.request("web", "none") };
    assert_eq!(network.setup(&none).unwrap_err().kind(), ErrorKind::Unsupported);
    let error = network.setup(&container.request("web", "nosuch")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("`nosuch`"));
    assert_eq!(state_of_host(), before);
    assert!(!lab.home.networks().join("kiln.json").exists(), "nothing is made that was not asked for");
}

#[test]
fn a_supervisor_that_ends_takes_its_container_off_the_network() {
    let Some(lab) = Lab::enter() else { return };
    let before = state_of_host();
    let container = Container::start();
    let mut command = Command::new(Supervisor::program());
    command.args([lab.home.path().to_str().unwrap(), "kiln", &container.pid().to_string(), "web"]);
    let supervisor = Supervisor::start(command);
    let status = format!("/proc/{}/status", supervisor.child.id());
    assert!(supervisor.told["addresses"][0].as_str().unwrap().parse::<Ipv4Addr>().is_ok());
    let threads = std::fs::read_to_string(status).unwrap();
    assert!(threads.contains("Threads:\t2\n"), "names take one thread, and ports that are not there none");
    supervisor.end();
    wait_for("the host to be as it was", || state_of_host() == before);
}
