//! Page-locking through the CUDA driver.
//!
//! `libcuda` is opened at run time: the crate builds and runs where there is none, memory can be registered and freed
//! from any thread without Python, and it works with whatever CUDA runtime torch brought. The device's primary context
//! is the one that runtime uses.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::NonNull;

use libloading::{Library, Symbol};

use crate::registrar::Registrar;

type Context = *mut c_void;

/// `CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP`: for all contexts, readable by kernels.
const REGISTER_FLAGS: c_uint = 3;
/// `CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM`.
const HOST_POINTER_ATTRIBUTE: c_int = 91;

/// Registers memory with one CUDA device.
#[derive(Debug)]
pub(crate) struct CudaRegistrar {
    library: Library,
    device: c_int,
    context: Context,
}

// SAFETY: the context is a handle that the driver lets any thread make current; the library's functions are
// thread-safe.
unsafe impl Send for CudaRegistrar {}
// SAFETY: as above.
unsafe impl Sync for CudaRegistrar {}

impl CudaRegistrar {
    /// Retains the primary context of device `ordinal`.
    ///
    /// # Errors
    /// Why memory cannot be registered: no driver, no such device, or a device that reads registered memory at another
    /// address than the host.
    pub(crate) fn new(ordinal: usize) -> Result<Self, String> {
        // SAFETY: the driver's initialisers are made to run at load time in any process.
        let library = unsafe { Library::new("libcuda.so.1") }.map_err(|error| format!("no CUDA driver: {error}"))?;
        let mut this = Self { library, device: 0, context: std::ptr::null_mut() };
        let init: Symbol<'_, unsafe extern "C" fn(c_uint) -> c_int> = this.symbol(c"cuInit")?;
        // SAFETY: the signature is the driver's; 0 is the only flag.
        this.check("cuInit", unsafe { init(0) })?;
        let get: Symbol<'_, unsafe extern "C" fn(*mut c_int, c_int) -> c_int> = this.symbol(c"cuDeviceGet")?;
        let mut device = 0;
        // SAFETY: `device` lives through the call.
        this.check("cuDeviceGet", unsafe { get(&raw mut device, ordinal as c_int) })?;
        let attribute: Symbol<'_, unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int> =
            this.symbol(c"cuDeviceGetAttribute")?;
        let mut same_address = 0;
        // SAFETY: `same_address` lives through the call.
        let code = unsafe { attribute(&raw mut same_address, HOST_POINTER_ATTRIBUTE, device) };
        this.check("cuDeviceGetAttribute", code)?;
        if same_address == 0 {
            return Err("this device reads page-locked memory at another address than the host".to_owned());
        }
        let retain: Symbol<'_, unsafe extern "C" fn(*mut Context, c_int) -> c_int> =
            this.symbol(c"cuDevicePrimaryCtxRetain")?;
        let mut context: Context = std::ptr::null_mut();
        // SAFETY: `context` lives through the call; it is released in `drop`.
        this.check("cuDevicePrimaryCtxRetain", unsafe { retain(&raw mut context, device) })?;
        (this.device, this.context) = (device, context);
        Ok(this)
    }

    /// A function of the driver.
    fn symbol<T>(&self, name: &CStr) -> Result<Symbol<'_, T>, String> {
        // SAFETY: every caller names the type of the function in the driver's documentation.
        unsafe { self.library.get(name.to_bytes_with_nul()) }.map_err(|error| error.to_string())
    }

    fn check(&self, call: &str, code: c_int) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        let mut name: *const c_char = std::ptr::null();
        let describe: Symbol<'_, unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int> =
            self.symbol(c"cuGetErrorName")?;
        // SAFETY: `name` lives through the call.
        if unsafe { describe(code, &raw mut name) } != 0 || name.is_null() {
            return Err(format!("{call} failed with error {code}"));
        }
        // SAFETY: the driver returned a string that lives as long as the library.
        let name = unsafe { CStr::from_ptr(name) };
        Err(format!("{call} failed: {}", name.to_string_lossy()))
    }

    /// Runs `work` with the device's context current on this thread.
    fn with_context(&self, work: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
        let push: Symbol<'_, unsafe extern "C" fn(Context) -> c_int> = self.symbol(c"cuCtxPushCurrent_v2")?;
        let pop: Symbol<'_, unsafe extern "C" fn(*mut Context) -> c_int> = self.symbol(c"cuCtxPopCurrent_v2")?;
        // SAFETY: the context is retained as long as `self` lives.
        self.check("cuCtxPushCurrent", unsafe { push(self.context) })?;
        let result = work();
        let mut popped: Context = std::ptr::null_mut();
        // SAFETY: `popped` lives through the call; this undoes the push above.
        self.check("cuCtxPopCurrent", unsafe { pop(&raw mut popped) }).and(result)
    }
}

impl Registrar for CudaRegistrar {
    fn register(&self, start: NonNull<u8>, bytes: usize) -> Result<(), String> {
        let register: Symbol<'_, unsafe extern "C" fn(*mut c_void, usize, c_uint) -> c_int> =
            self.symbol(c"cuMemHostRegister_v2")?;
        self.with_context(|| {
            // SAFETY: the caller owns `bytes` bytes from `start` and unregisters before it frees them.
            self.check("cuMemHostRegister", unsafe { register(start.as_ptr().cast(), bytes, REGISTER_FLAGS) })
        })
    }

    fn unregister(&self, start: NonNull<u8>) {
        let Ok(unregister) = self.symbol::<unsafe extern "C" fn(*mut c_void) -> c_int>(c"cuMemHostUnregister") else {
            return;
        };
        // An error means that the driver has shut down, which unregistered everything.
        let _ = self.with_context(|| {
            // SAFETY: `register` succeeded for `start`.
            self.check("cuMemHostUnregister", unsafe { unregister(start.as_ptr().cast()) })
        });
    }
}

impl Drop for CudaRegistrar {
    fn drop(&mut self) {
        if self.context.is_null() {
            return;
        }
        if let Ok(release) = self.symbol::<unsafe extern "C" fn(c_int) -> c_int>(c"cuDevicePrimaryCtxRelease_v2") {
            // SAFETY: `new` retained this device's primary context once.
            unsafe { release(self.device) };
        }
    }
}
