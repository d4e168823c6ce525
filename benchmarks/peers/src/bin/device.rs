//! A block device on the published `vhost-user-backend` crate, to measure ours against.
//!
//! `device --socket=PATH [--socket=PATH ...] [--queues=N] [--file=IMAGE]`: a device on each path.
//!
//! Without an image every request succeeds and no data moves: this null device shows the cost of
//! the framework. With an image, each request is a `preadv` or `pwritev` straight between the page
//! cache and guest memory. One worker thread serves each queue.
//!
//! The device is as quick as the crate's public interface allows. It takes the vring's lock once per
//! wake-up instead of once per call, pops chains by reference (no reference count per chain), and
//! decides about the notification once per batch.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::thread;

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringMutex, VringState, VringT};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::QueueT;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    new_event_consumer_and_notifier, EventConsumer, EventFlag, EventNotifier,
};

const SECTOR: u64 = 512;
const NULL_CAPACITY: u64 = (1 << 30) / SECTOR;
const MAX_QUEUE_SIZE: usize = 1024;
/// Data buffers of one request; the device refuses more with an I/O error.
const MAX_SEGMENTS: usize = 256;

type Memory = GuestMemoryMmap<()>;

struct Block {
    queues: usize,
    image: Option<File>,
    capacity: u64,
    event_idx: AtomicBool,
    memory: RwLock<GuestMemoryAtomic<Memory>>,
}

impl Block {
    fn new(queues: usize, image: Option<File>) -> io::Result<Self> {
        let capacity = match &image {
            Some(file) => file.metadata()?.len() / SECTOR,
            None => NULL_CAPACITY,
        };
        Ok(Block {
            queues,
            image,
            capacity,
            event_idx: AtomicBool::new(false),
            memory: RwLock::new(GuestMemoryAtomic::new(Memory::new())),
        })
    }

    /// Move the data of one request; return the status and the bytes written for the driver.
    fn transfer(&self, memory: &Memory, kind: u32, sector: u64, data: &[Descriptor]) -> (u32, u32) {
        let write = match kind {
            VIRTIO_BLK_T_IN => false,
            VIRTIO_BLK_T_OUT => true,
            VIRTIO_BLK_T_FLUSH => {
                return match &self.image {
                    Some(file) if file.sync_data().is_err() => (VIRTIO_BLK_S_IOERR, 0),
                    _ => (VIRTIO_BLK_S_OK, 0),
                };
            }
            _ => return (VIRTIO_BLK_S_UNSUPP, 0),
        };
        let total: u64 = data.iter().map(|d| u64::from(d.len())).sum();
        let arrived = if write { 0 } else { total as u32 };
        let Some(file) = &self.image else {
            return (VIRTIO_BLK_S_OK, arrived);
        };
        let end = sector.checked_add(total.div_ceil(SECTOR));
        if end.is_none_or(|end| end > self.capacity) {
            return (VIRTIO_BLK_S_IOERR, 0);
        }

        let mut vectors = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_SEGMENTS];
        let mut count = 0;
        for descriptor in data {
            for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
                let (Ok(slice), Some(vector)) = (slice, vectors.get_mut(count)) else {
                    return (VIRTIO_BLK_S_IOERR, 0);
                };
                vector.iov_base = slice.ptr_guard_mut().as_ptr().cast();
                vector.iov_len = slice.len();
                count += 1;
            }
        }
        let (fd, offset) = (file.as_raw_fd(), (sector * SECTOR) as i64);
        // SAFETY: each vector is a slice inside a region that `memory` keeps mapped, and the
        // kernel checks the rest.
        let moved = unsafe {
            if write {
                libc::pwritev(fd, vectors.as_ptr(), count as i32, offset)
            } else {
                libc::preadv(fd, vectors.as_ptr(), count as i32, offset)
            }
        };
        if moved < 0 || moved as u64 != total {
            return (VIRTIO_BLK_S_IOERR, 0);
        }
        (VIRTIO_BLK_S_OK, arrived)
    }

    /// Take and complete every available chain; return whether there was one.
    fn process(&self, vring: &mut VringState, memory: &Memory) -> io::Result<bool> {
        let mut data = [Descriptor::default(); MAX_SEGMENTS];
        let mut any = false;
        while let Some(mut chain) = vring.get_queue_mut().pop_descriptor_chain(memory) {
            let head = chain.head_index();
            let Some(header) = chain.next() else { continue };
            let mut count = 0;
            let mut last = None;
            for descriptor in chain {
                if let Some(previous) = last.replace(descriptor) {
                    if count == MAX_SEGMENTS {
                        return Err(io::Error::other("too many segments"));
                    }
                    data[count] = previous;
                    count += 1;
                }
            }
            let Some(status) = last.filter(|d| d.is_write_only() && d.len() > 0) else {
                continue;
            };
            let request: [u8; 16] = memory.read_obj(header.addr()).map_err(io::Error::other)?;
            let kind = u32::from_le_bytes(request[0..4].try_into().unwrap());
            let sector = u64::from_le_bytes(request[8..16].try_into().unwrap());
            let (code, written) = self.transfer(memory, kind, sector, &data[..count]);
            let place = GuestAddress(status.addr().0 + u64::from(status.len()) - 1);
            memory.write_obj(code as u8, place).map_err(io::Error::other)?;
            vring.add_used(head, written + 1).map_err(io::Error::other)?;
            any = true;
        }
        if any && vring.needs_notification().map_err(io::Error::other)? {
            vring.signal_used_queue()?;
        }
        Ok(any)
    }
}

impl VhostUserBackend for Block {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        self.queues
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_MQ
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&self, enabled: bool) {
        self.event_idx.store(enabled, Ordering::Relaxed);
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        // virtio_blk_config up to num_queues; only capacity and num_queues are not zero.
        let mut config = [0u8; 60];
        config[0..8].copy_from_slice(&self.capacity.to_le_bytes());
        config[34..36].copy_from_slice(&(self.queues as u16).to_le_bytes());
        (offset..offset.saturating_add(size))
            .map(|i| config.get(i as usize).copied().unwrap_or(0))
            .collect()
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<Memory>) -> io::Result<()> {
        *self.memory.write().unwrap() = memory;
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues).map(|queue| 1 << queue).collect()
    }

    /// Without an exit event the crate waits for ever for its workers when a connection ends.
    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &self,
        event: u16,
        _: EventSet,
        vrings: &[VringMutex],
        _thread: usize,
    ) -> io::Result<()> {
        // The crate numbers ring events within the thread, and each thread has one ring.
        let mut vring = vrings[event as usize].get_mut();
        let memory = self.memory.read().unwrap().memory();
        if !self.event_idx.load(Ordering::Relaxed) {
            self.process(&mut vring, &memory)?;
            return Ok(());
        }
        loop {
            vring.disable_notification().map_err(io::Error::other)?;
            self.process(&mut vring, &memory)?;
            if !vring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (mut sockets, mut queues, mut image) = (Vec::new(), 1, None);
    for argument in std::env::args().skip(1) {
        match argument.split_once('=') {
            Some(("--socket", path)) => sockets.push(path.to_owned()),
            Some(("--queues", count)) => queues = count.parse()?,
            Some(("--file", path)) => {
                image = Some(File::options().read(true).write(true).open(path)?);
            }
            _ => return Err(format!("unknown argument {argument}").into()),
        }
    }
    let mut first = None;
    for socket in sockets {
        let image = image.as_ref().map(File::try_clone).transpose()?;
        let block = Arc::new(Block::new(queues, image)?);
        let thread = thread::spawn(move || serve(&socket, block));
        first.get_or_insert(thread);
    }
    let first = first.ok_or("--socket=PATH is needed")?;
    first.join().map_err(|_| "a device panicked")?.map_err(Into::into)
}

/// Serve one front-end after another.
fn serve(socket: &str, block: Arc<Block>) -> Result<(), String> {
    loop {
        let memory = GuestMemoryAtomic::new(Memory::new());
        let mut daemon = VhostUserDaemon::new("block".to_owned(), block.clone(), memory)
            .map_err(|error| error.to_string())?;
        daemon.serve(socket).map_err(|error| error.to_string())?;
    }
}
