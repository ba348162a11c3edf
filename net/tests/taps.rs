//! Machines with a device of their own. The machine is a network namespace with a TAP device, whose other end is wired to
//! the one that Kiln made as a hypervisor would.

#![cfg(target_os = "linux")]

mod lab;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use kiln_contract::{ErrorKind, NetworkBackend as _, NetworkRequest, NetworkSpec, Protocol, PublishSpec};
use kiln_net::{MachineNetwork, NetworkDevice, NetworkOptions, Networks};
use kiln_usernet::guest::{DeviceConfig, become_tap, set_up};
use lab::{Container, Lab, address, ip, run, state_of_host, wait_for};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const PATIENCE: Duration = Duration::from_secs(5);
/// For what is not expected to happen.
const SHORT: Duration = Duration::from_millis(300);
/// Where the world outside is, and where a cloud would keep its machines' secrets.
const WORLD: &str = "198.51.100.2";
const METADATA: &str = "169.254.169.254";

/// A machine: what is in it is in a namespace of its own.
struct Machine {
    inside: Container,
    network: Option<MachineNetwork>,
    device: NetworkDevice,
    unplugged: Arc<AtomicBool>,
    wire: Option<JoinHandle<()>>,
}

impl Machine {
    fn start(lab: &Lab, name: &str, mode: &str, allow: &[&str]) -> Self {
        let inside = Container::start();
        let network = MachineNetwork::join(&lab.home, &request(&inside, name, mode, allow)).unwrap();
        let device = network.device().unwrap().clone();
        assert_eq!(network.address(), IpAddr::from(device.address));
        let end = inside.inside(|| tap("eth0"));
        let unplugged = Arc::new(AtomicBool::new(false));
        let wire = {
            let (host, unplugged) = (Arc::clone(&device.host), Arc::clone(&unplugged));
            std::thread::spawn(move || carry(&host, &end, &unplugged))
        };
        let machine = Self { inside, network: Some(network), device, unplugged, wire: Some(wire) };
        machine.assume(machine.device.address.to_string().as_str());
        machine
    }

    /// Takes an address on its device, as its guest does.
    fn assume(&self, address: &str) {
        let config = DeviceConfig {
            name: "eth0".into(),
            mac: self.device.mac,
            address: address.parse().unwrap(),
            gateway: self.device.gateway,
            mtu: self.device.mtu,
        };
        self.inside.inside(|| set_up(&config)).unwrap();
    }

    fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.device.address.into(), port)
    }

    /// Ends it as SIGKILL does: whoever has its device open is gone.
    fn kill(self) {
        let Self { network, device, unplugged, wire, .. } = self;
        unplugged.store(true, Ordering::Relaxed);
        wire.unwrap().join().unwrap();
        drop((network, device));
    }

    fn reaches(&self, to: SocketAddr) -> (bool, bool) {
        self.inside.inside(|| (fetch(to, PATIENCE).is_some(), exchange(to, PATIENCE).is_some()))
    }

    fn is_walled_from(&self, to: SocketAddr) -> bool {
        self.inside.inside(|| fetch(to, SHORT).is_none() && exchange(to, SHORT).is_none())
    }
}

fn request(inside: &Container, name: &str, mode: &str, allow: &[&str]) -> NetworkRequest {
    let network = NetworkSpec {
        mode: mode.into(),
        allow: allow.iter().map(ToString::to_string).collect(),
        ..NetworkSpec::default()
    };
    NetworkRequest { network, namespace: None, ..inside.request(name, mode) }
}

/// A TAP device in the calling thread's namespace.
fn tap(name: &str) -> OwnedFd {
    let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    become_tap(&file, name).unwrap();
    file.into()
}

/// Carries frames between two devices.
fn carry(one: &OwnedFd, two: &OwnedFd, unplugged: &AtomicBool) {
    let mut frame = vec![0; 70_000];
    while !unplugged.load(Ordering::Relaxed) {
        let mut ends = [PollFd::new(one, PollFlags::IN), PollFd::new(two, PollFlags::IN)];
        let wait = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        if poll(&mut ends, Some(&wait)).unwrap() == 0 {
            continue;
        }
        let ready = [0, 1].map(|end| ends[end].revents().contains(PollFlags::IN));
        for (is_ready, from, to) in [(ready[0], one, two), (ready[1], two, one)] {
            if is_ready && let Ok(length) = rustix::io::read(from, &mut frame[..]) {
                // One that is not up takes none.
                let _ = rustix::io::write(to, &frame[..length]);
            }
        }
    }
}

/// Answers at a port of all addresses of the calling thread's namespace.
fn serve(port: u16) {
    serve_at("0.0.0.0", port);
}

fn serve_at(address: &str, port: u16) {
    let tcp = TcpListener::bind((address, port)).unwrap();
    let udp = UdpSocket::bind((address, port)).unwrap();
    std::thread::spawn(move || {
        for mut client in tcp.incoming().flatten() {
            let from = client.peer_addr().unwrap().ip();
            let _ = client.write_all(from.to_string().as_bytes());
        }
    });
    std::thread::spawn(move || {
        let mut words = [0; 1000];
        while let Ok((_, client)) = udp.recv_from(&mut words) {
            let _ = udp.send_to(client.ip().to_string().as_bytes(), client);
        }
    });
}

/// As whom the server sees the calling thread's namespace.
fn fetch(to: SocketAddr, wait: Duration) -> Option<String> {
    let mut connection = TcpStream::connect_timeout(&to, wait).ok()?;
    connection.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).ok()?;
    (!answer.is_empty()).then_some(answer)
}

fn exchange(to: SocketAddr, wait: Duration) -> Option<String> {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(wait)).unwrap();
    socket.connect(to).ok()?;
    socket.send(b"hello").ok()?;
    let mut answer = [0; 100];
    let length = socket.recv(&mut answer).ok()?;
    Some(String::from_utf8_lossy(&answer[..length]).into_owned())
}

/// The world outside, which knows no way to networks of Kiln's.
fn world() -> Container {
    let world = Container::start();
    ip("link add out type veth peer name in");
    ip(&format!("link set in netns {}", world.pid()));
    ip("addr add 198.51.100.1/24 dev out");
    ip("link set out up");
    for line in [
        "link set lo up",
        "addr add 198.51.100.2/24 dev in",
        "addr add 169.254.169.254/32 dev lo",
        "link set in up",
    ] {
        world.run(&format!("ip {line}")).unwrap();
    }
    ip("route add 169.254.169.254/32 via 198.51.100.2");
    // Answers come from the address that was asked.
    for (address, port) in [(WORLD, 80), (WORLD, 81), (METADATA, 80), (METADATA, 81)] {
        world.inside(|| serve_at(address, port));
    }
    // The kernel tells of a cable when it has the time.
    wait_for("the cable", || ip("-o link show out").contains("state UP"));
    world
}

fn to(host: &str, port: u16) -> SocketAddr {
    SocketAddr::new(host.parse().unwrap(), port)
}

#[test]
fn a_machine_with_a_device_reaches_out_and_its_neighbours_find_it_and_nothing_of_it_stays() {
    let Some(lab) = Lab::enter() else { return };
    let world = world();
    let before = state_of_host();
    let networks = Networks::open(&lab.home);
    networks.create("shop", &NetworkOptions::default()).unwrap();
    let machine = Machine::start(&lab, "vm", "tap:shop", &[]);
    let (near, far) = (Container::start(), Container::start());
    let (mut shop, mut street) = (lab.network(), lab.network());
    let attachment = near.connect(&mut shop, "near", "shop", &[]);
    let published = PublishSpec {
        host_address: None,
        host_port: 8080,
        host_port_last: None,
        container_port: 80,
        protocol: Protocol::Tcp,
    };
    let elsewhere = far.connect(&mut street, "far", "default", &[published]);
    for place in [&machine.inside, &near, &far] {
        place.inside(|| serve(80));
    }
    serve(22);

    let own = machine.device.address.to_string();
    let out = machine.inside.inside(|| (fetch(to(WORLD, 80), PATIENCE), exchange(to(WORLD, 80), PATIENCE)));
    let as_host = Some("198.51.100.1".to_owned());
    assert_eq!(out, (as_host.clone(), as_host), "through NAT\n{}", run("nft list ruleset"));
    let beside = machine.inside.inside(|| fetch(SocketAddr::new(address(&attachment), 80), PATIENCE));
    assert_eq!(beside.as_deref(), Some(own.as_str()), "neighbours see its address");
    let reached = near.inside(|| (fetch(machine.at(80), PATIENCE), exchange(machine.at(80), PATIENCE)));
    let as_near = Some(address(&attachment).to_string());
    assert_eq!(reached, (as_near.clone(), as_near));
    assert!(fetch(machine.at(80), PATIENCE).is_some(), "the host reaches it");
    let answer = near.run("busybox nslookup -type=a vm 127.0.0.11").unwrap();
    assert!(answer.contains(&format!("Address: {own}")), "{answer}");

    // Walls: other networks, the host, what it publishes for others, and where clouds keep secrets.
    let gateway = machine.device.gateway.to_string();
    for closed in [
        SocketAddr::new(address(&elsewhere), 80),
        to(&gateway, 22),
        to("198.51.100.1", 22),
        to("198.51.100.1", 8080),
        to(METADATA, 80),
    ] {
        assert!(machine.is_walled_from(closed), "{closed}");
    }
    assert!(far.inside(|| fetch(machine.at(80), SHORT)).is_none(), "from another network");
    // Nobody else's address gets it anywhere.
    let free = machine.device.address.octets()[3] + 40;
    let octets = machine.device.address.octets();
    machine.assume(&format!("{}.{}.{}.{free}", octets[0], octets[1], octets[2]));
    assert!(machine.is_walled_from(to(WORLD, 80)), "with a source that is not its own");
    assert!(machine.is_walled_from(SocketAddr::new(address(&attachment), 80)));
    machine.assume(&own);
    assert_eq!(machine.reaches(to(WORLD, 80)), (true, true), "and itself again");

    shop.teardown(&near.id).unwrap();
    street.teardown(&far.id).unwrap();
    let id = machine.inside.id.clone();
    machine.kill();
    wait_for("its device to go", || !ip("-o link").contains(&format!("klv{}", id.short())));
    MachineNetwork::leave(&lab.home, &id).unwrap();
    networks.remove("shop").unwrap();
    assert_eq!(state_of_host().replace("ip_forward = 1", ""), before, "{}", run("nft list ruleset"));
    drop(world);
}

#[test]
fn the_policy_of_a_machine_with_a_device_holds_outward_and_between_neighbours() {
    let Some(lab) = Lab::enter() else { return };
    let _world = world();
    let networks = Networks::open(&lab.home);
    networks.create("other", &NetworkOptions::default()).unwrap();
    let (near, far) = (Container::start(), Container::start());
    let (mut own, mut other) = (lab.network(), lab.network());
    let near_address = address(&near.connect(&mut own, "near", "default", &[]));
    let far_address = address(&far.connect(&mut other, "far", "other", &[]));
    for place in [&near, &far] {
        place.inside(|| serve(80));
        place.inside(|| serve(81));
    }
    serve(22);
    serve(23);
    let outside = to(WORLD, 80);
    let gateway = networks.find("kiln").unwrap().gateway.unwrap();
    for (name, allow, opened, closed) in [
        (
            "one",
            vec!["198.51.100.0/24:80".to_owned()],
            vec![outside],
            vec![to(WORLD, 81), SocketAddr::new(near_address, 80)],
        ),
        (
            "two",
            vec![near_address.to_string() + ":80"],
            vec![SocketAddr::new(near_address, 80)],
            vec![SocketAddr::new(near_address, 81), outside],
        ),
        // What is closed, another network, the host: only where they are named.
        (
            "three",
            vec!["any".into(), format!("{METADATA}:80")],
            vec![to(METADATA, 80), outside],
            vec![to(METADATA, 81), SocketAddr::new(far_address, 80)],
        ),
        (
            "four",
            vec![format!("{far_address}:80")],
            vec![SocketAddr::new(far_address, 80)],
            vec![SocketAddr::new(far_address, 81), outside],
        ),
        (
            "five",
            vec!["any".into(), format!("{gateway}:22")],
            vec![SocketAddr::new(gateway, 22)],
            vec![SocketAddr::new(gateway, 23)],
        ),
    ] {
        let allow: Vec<&str> = allow.iter().map(String::as_str).collect();
        let machine = Machine::start(&lab, name, "tap", &allow);
        machine.inside.inside(|| serve(80));
        for there in opened {
            assert_eq!(
                machine.reaches(there),
                (true, true),
                "{allow:?} {there}\n{}",
                run("nft list ruleset")
            );
        }
        for there in closed {
            assert!(machine.is_walled_from(there), "{allow:?} {there}");
        }
        assert!(
            near.inside(|| fetch(machine.at(80), PATIENCE)).is_some(),
            "{allow:?}: it answers whoever asks"
        );
        let id = machine.inside.id.clone();
        machine.kill();
        MachineNetwork::leave(&lab.home, &id).unwrap();
    }
}

#[test]
fn a_machine_on_an_internal_network_reaches_its_neighbours_only() {
    let Some(lab) = Lab::enter() else { return };
    let _world = world();
    let options = NetworkOptions { internal: true, ..NetworkOptions::default() };
    Networks::open(&lab.home).create("cell", &options).unwrap();
    let near = Container::start();
    let mut network = lab.network();
    let near_address = address(&near.connect(&mut network, "near", "cell", &[]));
    near.inside(|| serve(80));
    let one = Machine::start(&lab, "one", "tap:cell", &["any", "198.51.100.2"]);
    let two = Machine::start(&lab, "two", "tap:cell", &[]);
    two.inside.inside(|| serve(80));
    assert_eq!(one.reaches(SocketAddr::new(near_address, 80)), (true, true));
    assert_eq!(one.reaches(two.at(80)), (true, true), "two devices\n{}", run("nft list ruleset"));
    assert!(one.is_walled_from(to(WORLD, 80)));
    let first = one.inside.id.clone();
    one.kill();
    MachineNetwork::leave(&lab.home, &first).unwrap();
    assert!(near.inside(|| fetch(two.at(80), PATIENCE)).is_some(), "the other stays");
}

#[test]
fn what_a_device_cannot_have_is_refused_with_the_reason() {
    let Some(lab) = Lab::enter() else { return };
    let options = NetworkOptions { usernet: true, ..NetworkOptions::default() };
    Networks::open(&lab.home).create("cells", &options).unwrap();
    let before = state_of_host();
    let inside = Container::start();
    for (mode, allow, words) in [
        ("tap", &["example.org:443"][..], "`example.org:443` is none"),
        ("tap:cells", &[], "not possible with the network `cells`"),
        ("tap:nobody", &[], "no network is named `nobody`"),
    ] {
        let refused = MachineNetwork::join(&lab.home, &request(&inside, "vm", mode, allow)).unwrap_err();
        assert!(refused.to_string().contains(words), "{refused}");
    }
    let refused = lab.network().setup(&inside.request("c", "tap")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    assert!(refused.to_string().contains("connecting a container is not possible"), "{refused}");
    assert_eq!(state_of_host(), before);
}
