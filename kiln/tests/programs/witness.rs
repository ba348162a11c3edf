//! Writes, as fast as it can, who the machine that it runs in is: a line each time to the file that it is given, with host name,
//! machine id, the file of the host name, random numbers drawn in two ways, the time, and the address.

use std::fs::{File, read_to_string};
use std::io::{Read as _, Write as _};
use std::net::UdpSocket;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

unsafe extern "C" {
    /// getrandom(2), which the C library answers without the kernel where it can.
    fn getrandom(buffer: *mut u8, length: usize, flags: u32) -> isize;
}

fn main() {
    let path = std::env::args().nth(1).expect("a file to write to");
    let mut to = File::options().create(true).append(true).open(path).unwrap();
    let mut random = File::open("/dev/urandom").unwrap();
    loop {
        let (mut read, mut drawn) = ([0; 8], [0; 8]);
        let host = read_to_string("/proc/sys/kernel/hostname").unwrap();
        let id = read_to_string("/etc/machine-id").unwrap();
        let file = read_to_string("/etc/hostname").unwrap();
        random.read_exact(&mut read).unwrap();
        // SAFETY: the buffer is as long as is said.
        assert_eq!(unsafe { getrandom(drawn.as_mut_ptr(), drawn.len(), 0) }, 8);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        // Nothing is sent by this: it asks which address would be used.
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        let address = socket.connect("198.51.100.1:9").and_then(|()| socket.local_addr());
        let address = address.map_or_else(|_| "-".to_owned(), |address| address.ip().to_string());
        let line = format!(
            "{} {} {} {:016x} {:016x} {now:.3} {address}\n",
            host.trim(),
            id.trim(),
            file.trim(),
            u64::from_ne_bytes(read),
            u64::from_ne_bytes(drawn),
        );
        to.write_all(line.as_bytes()).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
}
