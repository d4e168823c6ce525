//! Drive a vhost-user block back-end with the published `vhost` crate's `Frontend`: set-up, I/O
//! with checked data, stop and start, memory slots, reset and tear-down.
//!
//! `rust-frontend SOCKET` prints a line per step and ends with status 0 when all went well.
//! The last 64 KiB of the device are overwritten.

use std::error::Error;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{fence, Ordering};

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap,
};
use vmm_sys_util::eventfd::EventFd;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const SECTOR: u64 = 512;
const QUEUE: u16 = 64;
const MEMORY: u64 = 0x10_0000;
/// Guest memory begins here, so that guest and region offsets differ.
const BASE: u64 = 0x4000_0000;
const SLOT: u64 = 0x8000_0000;
const DESCRIPTORS: u64 = BASE;
const AVAIL: u64 = BASE + 0x1000;
const USED: u64 = BASE + 0x2000;
const HEADER: u64 = BASE + 0x3000;
const STATUS: u64 = BASE + 0x3800;
const DATA: u64 = BASE + 0x10000;
const CALL_TIMEOUT_MS: i32 = 10_000;

fn memory_file(size: u64) -> Result<File> {
    // SAFETY: the name is a C string, and the fd that comes back is nobody else's.
    let file = unsafe {
        let fd = libc::memfd_create(c"guest-memory".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        File::from_raw_fd(fd)
    };
    file.set_len(size)?;
    Ok(file)
}

fn map(base: u64, size: u64) -> Result<GuestMemoryMmap<()>> {
    let file = FileOffset::new(memory_file(size)?, 0);
    let ranges = [(GuestAddress(base), size as usize, Some(file))];
    Ok(GuestMemoryMmap::from_ranges_with_files(ranges)?)
}

fn region(memory: &GuestMemoryMmap<()>, base: u64) -> Result<VhostUserMemoryRegionInfo> {
    let region = memory.find_region(GuestAddress(base)).ok_or("no region")?;
    Ok(VhostUserMemoryRegionInfo::from_guest_region(region)?)
}

/// The driver's side of one split ring with one request in flight at a time.
struct Driver<'a> {
    memory: &'a GuestMemoryMmap<()>,
    kick: &'a EventFd,
    call: &'a EventFd,
    event_idx: bool,
    avail: u16,
    used: u16,
}

impl Driver<'_> {
    /// One request; its status. `data` is (guest address, length, device writes it).
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> Result<u8> {
        let memory = self.memory;
        let mut header = [0u8; 16];
        header[0..4].copy_from_slice(&kind.to_le_bytes());
        header[8..16].copy_from_slice(&sector.to_le_bytes());
        memory.write_obj(header, GuestAddress(HEADER))?;
        memory.write_obj(0xffu8, GuestAddress(STATUS))?;

        let mut buffers = vec![(HEADER, 16, false)];
        buffers.extend_from_slice(data);
        buffers.push((STATUS, 1, true));
        for (index, (address, length, write)) in buffers.iter().enumerate() {
            let mut flags = if *write { VRING_DESC_F_WRITE } else { 0 };
            if index + 1 < buffers.len() {
                flags |= VRING_DESC_F_NEXT;
            }
            let next = index as u16 + 1;
            let descriptor = Descriptor::new(*address, *length, flags as u16, next);
            memory.write_obj(descriptor, GuestAddress(DESCRIPTORS + 16 * index as u64))?;
        }

        let slot = AVAIL + 4 + 2 * u64::from(self.avail % QUEUE);
        memory.write_obj(0u16, GuestAddress(slot))?;
        if self.event_idx {
            let used_event = AVAIL + 4 + 2 * u64::from(QUEUE);
            memory.write_obj(self.used.to_le(), GuestAddress(used_event))?;
        }
        let before = self.avail;
        self.avail = before.wrapping_add(1);
        memory.store(self.avail.to_le(), GuestAddress(AVAIL + 2), Ordering::Release)?;
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let place = USED + 4 + 8 * u64::from(QUEUE);
            let event: u16 = memory.load(GuestAddress(place), Ordering::Relaxed)?;
            u16::from_le(event) == before
        } else {
            let flags: u16 = memory.load(GuestAddress(USED), Ordering::Relaxed)?;
            u16::from_le(flags) & 1 == 0
        };
        if wanted {
            self.kick.write(1)?;
        }
        self.wait(kind)?;

        let place = USED + 4 + 8 * u64::from(self.used % QUEUE);
        let [id, written]: [u32; 2] = memory.read_obj(GuestAddress(place))?;
        self.used = self.used.wrapping_add(1);
        let status: u8 = memory.read_obj(GuestAddress(STATUS))?;
        if id != 0 {
            return Err(format!("chain {id} came back instead of 0").into());
        }
        let expected: u32 = data.iter().filter(|d| d.2).map(|d| d.1).sum();
        if u32::from(status) == VIRTIO_BLK_S_OK && written != expected + 1 {
            return Err(format!("{written} bytes written instead of {}", expected + 1).into());
        }
        Ok(status)
    }

    fn wait(&self, kind: u32) -> Result<()> {
        loop {
            let index: u16 = self.memory.load(GuestAddress(USED + 2), Ordering::Acquire)?;
            if u16::from_le(index) == self.used.wrapping_add(1) {
                return Ok(());
            }
            let mut call = libc::pollfd { fd: self.call.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid pollfd.
            match unsafe { libc::poll(&mut call, 1, CALL_TIMEOUT_MS) } {
                1 => self.call.read()?,
                _ => return Err(format!("no completion of a request of kind {kind}").into()),
            };
        }
    }

    /// Write, read back and flush at the end of the device.
    fn exercise(&mut self, capacity: u64, salt: u8) -> Result<()> {
        let start = capacity - 128;
        for (index, sectors) in [1u64, 8, 64].into_iter().enumerate() {
            let bytes = (sectors * SECTOR) as usize;
            let pattern: Vec<u8> = (0..bytes).map(|i| (i / 7) as u8 ^ salt ^ index as u8).collect();
            self.memory.write_slice(&pattern, GuestAddress(DATA))?;
            let status = self.request(VIRTIO_BLK_T_OUT, start, &[(DATA, bytes as u32, false)])?;
            expect("write", status, VIRTIO_BLK_S_OK)?;
            self.memory.write_slice(&vec![0; bytes], GuestAddress(DATA))?;
            // Two buffers, one of them no multiple of a sector.
            let parts = [(DATA, 100, true), (DATA + 100, bytes as u32 - 100, true)];
            let status = self.request(VIRTIO_BLK_T_IN, start, &parts)?;
            expect("read", status, VIRTIO_BLK_S_OK)?;
            let mut read = vec![0; bytes];
            self.memory.read_slice(&mut read, GuestAddress(DATA))?;
            if read != pattern {
                return Err(format!("{sectors} sectors were read back wrong").into());
            }
        }
        expect("flush", self.request(VIRTIO_BLK_T_FLUSH, 0, &[])?, VIRTIO_BLK_S_OK)?;
        let beyond = self.request(VIRTIO_BLK_T_IN, capacity, &[(DATA, 512, true)])?;
        expect("read beyond the end", beyond, VIRTIO_BLK_S_IOERR)?;
        expect("unknown kind", self.request(0x7fff, 0, &[])?, VIRTIO_BLK_S_UNSUPP)
    }
}

fn expect(what: &str, status: u8, wanted: u32) -> Result<()> {
    if u32::from(status) == wanted {
        return Ok(());
    }
    Err(format!("{what}: status {status} instead of {wanted}").into())
}

fn start(frontend: &mut Frontend, base: u16, kick: &EventFd, call: &EventFd, user: u64) -> Result<()> {
    let config = VringConfigData {
        queue_max_size: QUEUE,
        queue_size: QUEUE,
        flags: 0,
        desc_table_addr: user,
        used_ring_addr: user + (USED - BASE),
        avail_ring_addr: user + (AVAIL - BASE),
        log_addr: None,
    };
    frontend.set_vring_call(0, call)?;
    frontend.set_vring_num(0, QUEUE)?;
    frontend.set_vring_base(0, base)?;
    frontend.set_vring_addr(0, &config)?;
    frontend.set_vring_kick(0, kick)?;
    Ok(frontend.set_vring_enable(0, true)?)
}

fn drive(socket: &str) -> Result<()> {
    let mut frontend = Frontend::connect(socket, 1)?;
    let offered = frontend.get_features()?;
    let framing = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    let needed = framing | 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_BLK_F_FLUSH;
    if offered & needed != needed {
        return Err(format!("features {offered:#x}").into());
    }
    let protocol = frontend.get_protocol_features()?
        & (VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE);
    frontend.set_protocol_features(protocol)?;
    if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    if protocol.contains(VhostUserProtocolFeatures::MQ) {
        println!("queues: {}", frontend.get_queue_num()?);
    }
    frontend.set_owner()?;
    if !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
        return Err("no configuration".into());
    }
    let (_, config) = frontend.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8])?;
    let capacity = u64::from_le_bytes(config.as_slice().try_into()?);
    println!("capacity: {capacity} sectors");
    let event_idx = offered & (1 << VIRTIO_RING_F_EVENT_IDX);
    frontend.set_features(needed | event_idx)?;

    let memory = map(BASE, MEMORY)?;
    let table = [region(&memory, BASE)?];
    let user = table[0].userspace_addr;
    frontend.set_mem_table(&table)?;
    let (kick, call) = (EventFd::new(0)?, EventFd::new(0)?);
    start(&mut frontend, 0, &kick, &call, user)?;
    let mut driver = Driver {
        memory: &memory,
        kick: &kick,
        call: &call,
        event_idx: event_idx != 0,
        avail: 0,
        used: 0,
    };
    driver.exercise(capacity, 0x11)?;
    println!("input and output: {} requests", driver.avail);

    let base = frontend.get_vring_base(0)?;
    if base != u32::from(driver.avail) {
        return Err(format!("stopped at {base} instead of {}", driver.avail).into());
    }
    start(&mut frontend, driver.avail, &kick, &call, user)?;
    driver.exercise(capacity, 0x22)?;
    println!("stopped at {base}, started again");

    if protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
        let slots = frontend.get_max_mem_slots()?;
        let more = map(SLOT, MEMORY)?;
        let slot = region(&more, SLOT)?;
        frontend.add_mem_region(&slot)?;
        // The device reaches the slot while the ring runs; the data comes back through it.
        let status = driver.request(VIRTIO_BLK_T_IN, capacity - 128, &[(SLOT, 512, true)])?;
        expect("read into a memory slot", status, VIRTIO_BLK_S_OK)?;
        let byte: u8 = more.read_obj(GuestAddress(SLOT + 7))?;
        if byte != (7 / 7) ^ 0x22 ^ 2 {
            return Err(format!("{byte:#x} was read into a memory slot").into());
        }
        frontend.remove_mem_region(&slot)?;
        println!("memory slots: {slots}, one added, used and removed");
    }

    frontend.set_vring_enable(0, false)?;
    let base = frontend.get_vring_base(0)?;
    if base != u32::from(driver.avail) {
        return Err(format!("ended at {base} instead of {}", driver.avail).into());
    }
    if protocol.contains(VhostUserProtocolFeatures::RESET_DEVICE) {
        frontend.reset_device()?;
        println!("reset");
    }
    println!("done: {} requests", driver.avail);
    Ok(())
}

fn main() {
    let Some(socket) = std::env::args().nth(1) else {
        eprintln!("usage: rust-frontend SOCKET");
        std::process::exit(2);
    };
    if let Err(error) = drive(&socket) {
        eprintln!("rust-frontend: {error}");
        std::process::exit(1);
    }
}
