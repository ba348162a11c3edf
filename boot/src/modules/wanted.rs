//! Which parts of Linux a machine needs.

/// A part of Linux: its module, and the option of the kernel's configuration that gives it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) module: &'static str,
    pub(crate) config: &'static str,
    pub(crate) need: Need,
}

/// What happens where a kernel has not got it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// No machine can have the kernel. Loaded at boot.
    Always,
    /// Only what workloads do with it fails. Loaded when it is asked for.
    Later,
}

/// Whether no machine can have a kernel without it.
pub(crate) fn is_vital(wanted: &Wanted) -> bool {
    wanted.need == Need::Always
}

const fn always(module: &'static str, config: &'static str) -> Wanted {
    Wanted { module, config, need: Need::Always }
}

const fn later(module: &'static str, config: &'static str) -> Wanted {
    Wanted { module, config, need: Need::Later }
}

/// What machines need, in the order in which it is loaded: first the one device that a guest talks to its host by.
/// What these depend on is found by [`super::resolve`].
pub(crate) const WANTED: &[Wanted] = &[
    always("virtio", "CONFIG_VIRTIO"),
    always("virtio_ring", "CONFIG_VIRTIO"),
    always("virtio_mmio", "CONFIG_VIRTIO_MMIO"),
    always("virtio_console", "CONFIG_VIRTIO_CONSOLE"),
    always("virtio_pci", "CONFIG_VIRTIO_PCI"),
    always("virtio_blk", "CONFIG_VIRTIO_BLK"),
    always("virtio_rng", "CONFIG_HW_RANDOM_VIRTIO"),
    always("virtio_balloon", "CONFIG_VIRTIO_BALLOON"),
    always("vmw_vsock_virtio_transport", "CONFIG_VIRTIO_VSOCKETS"),
    always("erofs", "CONFIG_EROFS_FS"),
    always("ext4", "CONFIG_EXT4_FS"),
    always("overlay", "CONFIG_OVERLAY_FS"),
    always("tun", "CONFIG_TUN"),
    always("9p", "CONFIG_9P_FS"),
    always("9pnet_fd", "CONFIG_NET_9P_FD"),
    always("fuse", "CONFIG_FUSE_FS"),
    // What container engines inside of a machine ask for.
    later("nf_tables", "CONFIG_NF_TABLES"),
    later("nft_chain_nat", "CONFIG_NFT_NAT"),
    later("nft_compat", "CONFIG_NFT_COMPAT"),
    later("nft_ct", "CONFIG_NFT_CT"),
    later("nft_fib_inet", "CONFIG_NFT_FIB_INET"),
    later("nft_limit", "CONFIG_NFT_LIMIT"),
    later("nft_log", "CONFIG_NFT_LOG"),
    later("nft_masq", "CONFIG_NFT_MASQ"),
    later("nft_nat", "CONFIG_NFT_NAT"),
    later("nft_objref", "CONFIG_NFT_OBJREF"),
    later("nft_redir", "CONFIG_NFT_REDIR"),
    later("nft_reject_inet", "CONFIG_NFT_REJECT_INET"),
    later("nft_reject_ipv4", "CONFIG_NFT_REJECT_IPV4"),
    later("nft_reject_ipv6", "CONFIG_NFT_REJECT_IPV6"),
    later("nf_conntrack_netlink", "CONFIG_NF_CT_NETLINK"),
    later("nf_nat", "CONFIG_NF_NAT"),
    later("ip_tables", "CONFIG_IP_NF_IPTABLES"),
    later("iptable_filter", "CONFIG_IP_NF_FILTER"),
    later("iptable_nat", "CONFIG_IP_NF_NAT"),
    later("iptable_mangle", "CONFIG_IP_NF_MANGLE"),
    later("iptable_raw", "CONFIG_IP_NF_RAW"),
    later("ip6_tables", "CONFIG_IP6_NF_IPTABLES"),
    later("ip6table_filter", "CONFIG_IP6_NF_FILTER"),
    later("ip6table_nat", "CONFIG_IP6_NF_NAT"),
    later("ip6table_mangle", "CONFIG_IP6_NF_MANGLE"),
    later("ip6table_raw", "CONFIG_IP6_NF_RAW"),
    later("ipt_REJECT", "CONFIG_IP_NF_TARGET_REJECT"),
    later("ip6t_REJECT", "CONFIG_IP6_NF_TARGET_REJECT"),
    later("xt_addrtype", "CONFIG_NETFILTER_XT_MATCH_ADDRTYPE"),
    later("xt_comment", "CONFIG_NETFILTER_XT_MATCH_COMMENT"),
    later("xt_conntrack", "CONFIG_NETFILTER_XT_MATCH_CONNTRACK"),
    later("xt_limit", "CONFIG_NETFILTER_XT_MATCH_LIMIT"),
    later("xt_mark", "CONFIG_NETFILTER_XT_MARK"),
    later("xt_MASQUERADE", "CONFIG_NETFILTER_XT_TARGET_MASQUERADE"),
    later("xt_multiport", "CONFIG_NETFILTER_XT_MATCH_MULTIPORT"),
    later("xt_nat", "CONFIG_NETFILTER_XT_NAT"),
    later("xt_physdev", "CONFIG_NETFILTER_XT_MATCH_PHYSDEV"),
    later("xt_REDIRECT", "CONFIG_NETFILTER_XT_TARGET_REDIRECT"),
    later("xt_set", "CONFIG_NETFILTER_XT_SET"),
    later("xt_state", "CONFIG_NETFILTER_XT_MATCH_STATE"),
    later("xt_statistic", "CONFIG_NETFILTER_XT_MATCH_STATISTIC"),
    later("xt_tcpudp", "CONFIG_NETFILTER_XTABLES"),
    later("xt_TCPMSS", "CONFIG_NETFILTER_XT_TARGET_TCPMSS"),
    later("xt_u32", "CONFIG_NETFILTER_XT_MATCH_U32"),
    later("ip_set", "CONFIG_IP_SET"),
    later("ip_set_hash_ip", "CONFIG_IP_SET_HASH_IP"),
    later("ip_set_hash_ipport", "CONFIG_IP_SET_HASH_IPPORT"),
    later("ip_set_hash_net", "CONFIG_IP_SET_HASH_NET"),
    later("ip_vs", "CONFIG_IP_VS"),
    later("ip_vs_rr", "CONFIG_IP_VS_RR"),
    later("xt_ipvs", "CONFIG_NETFILTER_XT_MATCH_IPVS"),
    later("bridge", "CONFIG_BRIDGE"),
    later("br_netfilter", "CONFIG_BRIDGE_NETFILTER"),
    later("veth", "CONFIG_VETH"),
    later("dummy", "CONFIG_DUMMY"),
    later("ipvlan", "CONFIG_IPVLAN"),
    later("macvlan", "CONFIG_MACVLAN"),
    later("vxlan", "CONFIG_VXLAN"),
    later("wireguard", "CONFIG_WIREGUARD"),
    later("loop", "CONFIG_BLK_DEV_LOOP"),
    later("virtio_net", "CONFIG_VIRTIO_NET"),
    later("xfrm_user", "CONFIG_XFRM_USER"),
    later("inet_diag", "CONFIG_INET_DIAG"),
    later("tcp_diag", "CONFIG_INET_TCP_DIAG"),
    later("udp_diag", "CONFIG_INET_UDP_DIAG"),
    later("unix_diag", "CONFIG_UNIX_DIAG"),
    later("binfmt_misc", "CONFIG_BINFMT_MISC"),
    later("autofs4", "CONFIG_AUTOFS_FS"),
];
