//! The guest's name server.

use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::sync::{Arc, Mutex};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::opt::EdnsCode;
use hickory_proto::rr::rdata::{A, AAAA, CNAME, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use kiln_net::usernet::{GatewayOptions, NameTable, Route, Upstreams};
use std::io::{Read, Write};

use crate::world::{FAR, GATEWAY, GATEWAY6, World, address, ask, exchange, options};

/// A name server in the world that knows what is given as (name, type, data, TTL), and remembers what it was asked.
pub struct NameServer {
    pub asked: Arc<Mutex<Vec<String>>>,
}

type Zone = &'static [(&'static str, &'static str, u32)];

impl NameServer {
    /// At port 53 of the world.
    pub fn start(world: &World, zone: Zone) -> Self {
        let (udp, tcp) =
            world.far.inside(|| (UdpSocket::bind((FAR, 53)).unwrap(), TcpListener::bind((FAR, 53)).unwrap()));
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let log = Arc::clone(&asked);
        std::thread::spawn(move || {
            let mut query = [0; 4096];
            while let Ok((length, client)) = udp.recv_from(&mut query) {
                let answer = Self::answer(&query[..length], zone, &log, true);
                let _ = udp.send_to(&answer, client);
            }
        });
        let log = Arc::clone(&asked);
        std::thread::spawn(move || {
            for mut stream in tcp.incoming().flatten() {
                let mut length = [0; 2];
                while stream.read_exact(&mut length).is_ok() {
                    let mut query = vec![0; usize::from(u16::from_be_bytes(length))];
                    stream.read_exact(&mut query).unwrap();
                    let answer = Self::answer(&query, zone, &log, false);
                    stream.write_all(&(answer.len() as u16).to_be_bytes()).unwrap();
                    stream.write_all(&answer).unwrap();
                }
            }
        });
        Self { asked }
    }

    fn answer(query: &[u8], zone: Zone, log: &Mutex<Vec<String>>, udp: bool) -> Vec<u8> {
        let query = Message::from_vec(query).unwrap();
        let question = &query.queries[0];
        log.lock().unwrap().push(format!("{} {}", question.name(), question.query_type()));
        let mut answer = Message::response(query.metadata.id, OpCode::Query);
        answer.add_query(question.clone());
        let mut name = question.name().to_ascii().to_ascii_lowercase();
        let mut known = false;
        for (owner, data, ttl) in zone {
            if format!("{owner}.") != name {
                continue;
            }
            known = true;
            let data = match data.parse() {
                Ok(IpAddr::V4(v4)) => RData::A(A(v4)),
                Ok(IpAddr::V6(v6)) => RData::AAAA(AAAA(v6)),
                Err(_) if data.starts_with('"') => RData::TXT(TXT::new(vec![data.to_string()])),
                Err(_) => RData::CNAME(CNAME(Name::from_ascii(format!("{data}.")).unwrap())),
            };
            let wanted = data.record_type() == question.query_type();
            if let RData::CNAME(alias) = &data {
                name = alias.0.to_ascii();
            } else if !wanted {
                continue;
            } else if udp && matches!(data, RData::TXT(_)) {
                // As if it were too long.
                answer.metadata.truncation = true;
                continue;
            }
            let owner = Name::from_ascii(format!("{owner}.")).unwrap();
            answer.add_answer(Record::from_rdata(owner, *ttl, data));
        }
        if !known {
            answer.metadata.response_code = ResponseCode::NXDomain;
        }
        answer.to_vec().unwrap()
    }
}

/// How the guest's name server answers.
pub fn query(world: &World, name: &str, kind: RecordType) -> Message {
    let socket = world.datagrams(&format!("{GATEWAY}:53"));
    let bytes = question(name, kind).to_vec().unwrap();
    Message::from_vec(&ask(&socket, &bytes).unwrap()).unwrap()
}

fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
    let mut question = Query::new();
    question.set_name(Name::from_ascii(format!("{name}.")).unwrap()).set_query_type(kind);
    message.add_query(question);
    message.set_edns(Edns::new());
    message.metadata.recursion_desired = true;
    message
}

pub fn data(answer: &Message) -> Vec<String> {
    answer.answers.iter().map(|record| record.data.to_string()).collect()
}

pub fn with_server(rules: &[&str]) -> GatewayOptions {
    let far = SocketAddr::new(address(FAR), 53);
    GatewayOptions { upstreams: Upstreams::These(vec![far]), ..options(rules) }
}

#[test]
fn the_networks_names_are_answered_first_and_all_others_by_the_hosts_servers() {
    let table = Arc::new(NameTable::default());
    let (web, web6) = (address("10.99.0.7"), address("fd99::7"));
    table.insert(web, &["web", "Www"], Route::Address(address(FAR)));
    table.insert(web6, &["web"], Route::Address(address("fd77::2")));
    let options = GatewayOptions { names: table.clone(), ..with_server(&["any"]) };
    let Some(world) = World::start(options) else { return };
    let server = NameServer::start(
        &world,
        &[
            ("b.test", "a.test", 60),
            ("a.test", "192.0.2.1", 60),
            ("t.test", "\"text\"", 60),
            ("web.test", "192.0.2.9", 60),
        ],
    );
    let none: &[&str] = &[];
    for (name, kind, code, expected) in [
        ("web", RecordType::A, ResponseCode::NoError, &["10.99.0.7"][..]),
        ("WEB.kiln.internal", RecordType::A, ResponseCode::NoError, &["10.99.0.7"]),
        ("www", RecordType::A, ResponseCode::NoError, &["10.99.0.7"]),
        ("web", RecordType::AAAA, ResponseCode::NoError, &["fd99::7"]),
        ("www", RecordType::AAAA, ResponseCode::NoError, none),
        ("web", RecordType::MX, ResponseCode::NoError, none),
        ("nobody.kiln.internal", RecordType::A, ResponseCode::NXDomain, none),
        ("dns.kiln.internal", RecordType::A, ResponseCode::NXDomain, none),
        ("host.kiln.internal", RecordType::A, ResponseCode::NoError, &[GATEWAY]),
        ("host.kiln.internal", RecordType::AAAA, ResponseCode::NoError, &[GATEWAY6]),
        ("7.0.99.10.in-addr.arpa", RecordType::PTR, ResponseCode::NoError, &["web.kiln.internal."]),
        ("1.0.0.192.in-addr.arpa", RecordType::PTR, ResponseCode::NoError, &["host.kiln.internal."]),
        ("a.test", RecordType::A, ResponseCode::NoError, &["192.0.2.1"]),
        ("b.test", RecordType::A, ResponseCode::NoError, &["a.test.", "192.0.2.1"]),
        ("web.test", RecordType::A, ResponseCode::NoError, &["192.0.2.9"]),
        ("nobody.test", RecordType::A, ResponseCode::NXDomain, none),
    ] {
        let answer = query(&world, name, kind);
        assert_eq!(answer.metadata.id, 0x1234);
        assert_eq!(
            (answer.metadata.response_code, data(&answer)),
            (code, expected.iter().map(ToString::to_string).collect()),
            "{name} {kind}"
        );
    }
    let asked = server.asked.lock().unwrap().clone();
    assert!(
        asked.iter().all(|asked| asked.contains(".test.")),
        "the network's own names stay here: {asked:?}"
    );

    // Longer answers come over TCP.
    assert!(query(&world, "t.test", RecordType::TXT).metadata.truncation);
    let bytes = question("t.test", RecordType::TXT).to_vec().unwrap();
    let framed = [&(bytes.len() as u16).to_be_bytes(), bytes.as_slice()].concat();
    for gateway in [format!("{GATEWAY}:53"), format!("[{GATEWAY6}]:53")] {
        let answers = exchange(&world.connect(&gateway).unwrap(), &framed.repeat(2)).unwrap();
        let half = answers.len() / 2;
        for answer in [&answers[2..half], &answers[half + 2..]] {
            assert_eq!(data(&Message::from_vec(answer).unwrap()), ["\"text\""]);
        }
    }

    // What the name leads to is reached through its route.
    world.serve_far(&format!("{FAR}:7000"));
    assert_eq!(exchange(&world.connect("10.99.0.7:7000").unwrap(), b"web").unwrap(), b"web");
    assert_eq!(ask(&world.datagrams("10.99.0.7:7000"), b"web").unwrap(), b"web");
    let listed = world.guest.run(&format!("busybox nslookup -type=a web {GATEWAY}")).unwrap();
    assert!(listed.contains("10.99.0.7"), "{listed}");
    table.remove(web);
    assert_eq!(query(&world, "www", RecordType::A).metadata.response_code, ResponseCode::NXDomain);
}

#[test]
fn what_is_no_query_is_not_answered_and_a_silent_server_is_a_failure() {
    let mut silent = with_server(&["any"]);
    silent.upstreams = Upstreams::These(vec![SocketAddr::new(address(FAR), 54)]);
    let Some(world) = World::start(silent) else { return };
    assert_eq!(query(&world, "a.test", RecordType::A).metadata.response_code, ResponseCode::ServFail);
    let socket = world.datagrams(&format!("{GATEWAY}:53"));
    socket.set_read_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
    let mut answer = question("a.test", RecordType::A);
    answer.metadata.message_type = MessageType::Response;
    for no_query in [b"".as_slice(), b"\xff", &[0xff; 600], &answer.to_vec().unwrap()] {
        assert!(ask(&socket, no_query).is_err(), "{no_query:?}");
    }
    let mut update = question("a.test", RecordType::A);
    update.metadata.op_code = OpCode::Update;
    let answer = ask(&socket, &update.to_vec().unwrap()).unwrap();
    assert_eq!(Message::from_vec(&answer).unwrap().metadata.response_code, ResponseCode::NotImp);
}

#[test]
fn a_denied_name_does_not_exist_and_says_why() {
    let Some(world) = World::start(with_server(&["*.good.test", "10.77.0.0/24"])) else { return };
    let server =
        NameServer::start(&world, &[("a.good.test", "10.77.0.2", 60), ("bad.test", "10.77.0.2", 60)]);
    assert_eq!(data(&query(&world, "a.good.test", RecordType::A)), ["10.77.0.2"]);
    for name in ["bad.test", "good.test", "a.good.test.bad.test", "8.8.8.8.in-addr.arpa"] {
        let kind = if name.ends_with("arpa") { RecordType::PTR } else { RecordType::A };
        let answer = query(&world, name, kind);
        assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain, "{name}");
        let why = answer.edns.unwrap().option(EdnsCode::Unknown(15)).cloned().unwrap();
        let why: Vec<u8> = (&why).try_into().unwrap();
        assert_eq!(why, [b"\x00\x12".as_slice(), b"not allowed by the network policy"].concat());
    }
    assert_eq!(
        query(&world, "2.0.77.10.in-addr.arpa", RecordType::PTR).metadata.response_code,
        ResponseCode::NXDomain
    );
    let asked = server.asked.lock().unwrap().clone();
    assert_eq!(asked, ["a.good.test. A", "2.0.77.10.in-addr.arpa. PTR"], "nothing else left the host");
    assert_eq!(world.gateway.counters().denied_names, 4);
}
