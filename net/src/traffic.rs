//! How much a container sent and received.

use std::fs;

use kiln_contract::BackendError;

use crate::NetError;

/// Received and sent bytes of all interfaces but `lo` in the network namespace of the process `pid`, since the
/// interfaces were made.
///
/// # Errors
/// There is no such process, or it may not be looked at.
pub fn traffic(pid: u32) -> Result<(u64, u64), BackendError> {
    let path = format!("/proc/{pid}/net/dev");
    let text = fs::read_to_string(&path).map_err(NetError::doing(format!("reading {path}")))?;
    Ok(sum(&text))
}

/// `proc_pid_net(5)`: two lines of headings, then `name: received-bytes … (8 fields) sent-bytes …`.
fn sum(text: &str) -> (u64, u64) {
    text.lines().skip(2).filter_map(|line| line.split_once(':')).filter(|(name, _)| name.trim() != "lo").fold(
        (0, 0),
        |(received, sent), (_, fields)| {
            let mut fields = fields.split_ascii_whitespace().map(|field| field.parse::<u64>().unwrap_or(0));
            (received + fields.next().unwrap_or(0), sent + fields.nth(7).unwrap_or(0))
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_interfaces_but_loopback_count() {
        let text = "Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     500       5    0    0    0     0          0         0      500       5    0    0    0     0       0          0
  eth0:    1000      10    0    0    0     0          0         0     2000      20    0    0    0     0       0          0
eth1:7 1 0 0 0 0 0 0 9 1 0 0 0 0 0 0
";
        assert_eq!(sum(text), (1007, 2009));
    }
}
