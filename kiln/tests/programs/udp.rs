//! Run in guests: `udp PORT` answers every datagram with "hello" before it; `udp HOST:PORT WORDS` says what was answered.

use std::net::UdpSocket;
use std::time::Duration;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let mut buffer = [0; 2000];
    match &words[..] {
        [port] => {
            let socket = UdpSocket::bind(format!("0.0.0.0:{port}")).unwrap();
            loop {
                let (length, from) = socket.recv_from(&mut buffer).unwrap();
                socket.send_to(&[b"hello ", &buffer[..length]].concat(), from).unwrap();
            }
        }
        [to, words] => {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            socket.connect(to.as_str()).unwrap();
            for _ in 0..4 {
                socket.send(words.as_bytes()).unwrap();
                if let Ok(length) = socket.recv(&mut buffer) {
                    println!("{}", String::from_utf8_lossy(&buffer[..length]));
                    return;
                }
            }
            std::process::exit(1);
        }
        _ => std::process::exit(2),
    }
}
