//! The screen that the firmware left: VGA text, or a framebuffer on which text is drawn.

use crate::DirectMap;
use crate::power::Port;
use arch::{HostPhysAddr, PhysMemory};
use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};

const VGA_TEXT: u64 = 0xb8000;
/// The VGA's CRT controller, by index and data, and its register that has the cursor's switch.
const CRT_CONTROLLER: u16 = 0x3d4;
const CURSOR_START: u8 = 0x0a;
const CURSOR_OFF: u8 = 1 << 5;
const FONT: FontWeight = FontWeight::Regular;
const HEIGHT: RasterHeight = RasterHeight::Size16;
const WIDTH: usize = get_raster_width(FONT, HEIGHT);
const LINES: usize = HEIGHT.val();

const FIRST: u8 = b' ';
const LAST: u8 = b'~';
/// The font's ASCII in four greys, two bits for a pixel: a quarter of what the crate has.
static GLYPHS: [[u16; LINES]; (LAST - FIRST) as usize + 1] = {
    let mut glyphs = [[0; LINES]; (LAST - FIRST) as usize + 1];
    let mut i = 0;
    while i < glyphs.len() {
        let character = (FIRST + i as u8) as char;
        let Some(glyph) = get_raster(character, FONT, HEIGHT) else {
            panic!("the font lacks an ASCII character");
        };
        let mut at = 0;
        while at < LINES * WIDTH {
            let grey = (glyph.pixels()[at] >> 6) as u16;
            glyphs[i][at / WIDTH] |= grey << (2 * (at % WIDTH));
            at += 1;
        }
        i += 1;
    }
    glyphs
};

/// The glyph of a character; `?` stands for what the font lacks.
fn glyph(character: u8) -> Option<&'static [u16; LINES]> {
    let find = |byte: u8| GLYPHS.get(usize::from(byte.wrapping_sub(FIRST)));
    find(character).or_else(|| find(b'?'))
}

/// A pixel in one of VGA's sixteen colours: blue, green and red from bit 0 on, and bright.
fn colour(vga: u8) -> [u8; 3] {
    let base = vga >> 3 & 1;
    [2, 1, 0].map(|channel| (vga >> channel & 1) * 0xaa + base * 0x55)
}

/// The four shades from one colour to another, as a framebuffer has them.
fn shades(frame: &Framebuffer, attribute: u8) -> [[u8; 4]; 4] {
    let (fore, back) = (colour(attribute & 0xf), colour(attribute >> 4 & 7));
    [0u16, 1, 2, 3].map(|level| {
        let mix = |fore: u8, back: u8| {
            ((u16::from(fore) * level + u16::from(back) * (3 - level)) / 3) as u8
        };
        let [red, green, blue] = [0, 1, 2].map(|i| mix(fore[i], back[i]));
        match (frame.bytes_per_pixel, frame.red_first) {
            (..3, _) => [((u16::from(red) + u16::from(green) + u16::from(blue)) / 3) as u8; 4],
            (_, true) => [red, green, blue, 0],
            (_, false) => [blue, green, red, 0],
        }
    })
}

/// A linear framebuffer in physical memory.
#[derive(Clone, Copy, Debug)]
pub struct Framebuffer {
    /// First byte.
    pub start: HostPhysAddr,
    /// Length in bytes.
    pub bytes: u64,
    /// Visible pixels in a line.
    pub width: usize,
    /// Lines.
    pub height: usize,
    /// Pixels from one line to the next.
    pub stride: usize,
    /// 1 to 4: below 3 all is grey.
    pub bytes_per_pixel: usize,
    /// The first byte of a pixel is red, else blue.
    pub red_first: bool,
}

enum Kind {
    Text,
    Pixels(Framebuffer),
}

/// A screen of text: cells to write to. What stands in them is the writer's to know, as reading a
/// screen is slower still than writing it.
pub struct Screen {
    map: DirectMap,
    kind: Kind,
    columns: usize,
    rows: usize,
}

impl Screen {
    /// Takes the VGA text buffer of 80 by 25, and turns its cursor off.
    ///
    /// # Safety
    /// The machine is in VGA text mode and nothing else writes its buffer or its CRT controller.
    #[must_use]
    pub unsafe fn text(map: DirectMap) -> Self {
        // SAFETY: promised by the caller; the register moves nothing but the cursor.
        unsafe {
            Port::new(CRT_CONTROLLER).write(CURSOR_START);
            Port::new(CRT_CONTROLLER + 1).write(CURSOR_OFF);
        }
        Self {
            map,
            kind: Kind::Text,
            columns: 80,
            rows: 25,
        }
    }

    /// Takes a framebuffer; `None` when its description contradicts itself or it is not mapped.
    ///
    /// # Safety
    /// The memory is the framebuffer's, and nothing else writes it.
    #[must_use]
    pub unsafe fn pixels(map: DirectMap, frame: Framebuffer) -> Option<Self> {
        let line = frame.stride.checked_mul(frame.bytes_per_pixel)?;
        let needed = u64::try_from(line.checked_mul(frame.height)?).ok()?;
        let columns = frame.width / WIDTH;
        let rows = frame.height / LINES;
        let sane = (1..=4).contains(&frame.bytes_per_pixel)
            && frame.width <= frame.stride
            && needed <= frame.bytes
            && columns > 0
            && rows > 0;
        map.pointer(frame.start, frame.bytes).filter(|_| sane)?;
        Some(Self {
            map,
            kind: Kind::Pixels(frame),
            columns,
            rows,
        })
    }

    /// Columns and rows.
    #[must_use]
    pub const fn size(&self) -> (usize, usize) {
        (self.columns, self.rows)
    }

    /// Writes cells of a row from a column on, each in VGA's layout: an ASCII character and its
    /// colours. What lies beyond the screen is left out.
    pub fn draw(&mut self, row: usize, column: usize, cells: &[[u8; 2]]) {
        let room = self.columns.saturating_sub(column);
        let cells = cells.get(..cells.len().min(room)).unwrap_or_default();
        if row >= self.rows {
            return;
        }
        match &self.kind {
            Kind::Text => {
                let cell = VGA_TEXT + 2 * (row * self.columns + column) as u64;
                self.map
                    .write(HostPhysAddr::new(cell), cells.as_flattened());
            }
            Kind::Pixels(frame) => {
                for (index, &[character, attribute]) in cells.iter().enumerate() {
                    if let Some(glyph) = glyph(character) {
                        let shades = shades(frame, attribute);
                        self.draw_glyph(frame, row, column + index, glyph, &shades);
                    }
                }
            }
        }
    }

    fn draw_glyph(
        &self,
        frame: &Framebuffer,
        row: usize,
        column: usize,
        glyph: &[u16; LINES],
        shades: &[[u8; 4]; 4],
    ) {
        for (line, pixels) in glyph.iter().enumerate() {
            // A line goes out at once, in few wide writes.
            let mut bytes = [0; WIDTH * 4];
            let places = bytes.chunks_exact_mut(frame.bytes_per_pixel);
            for (i, place) in places.enumerate().take(WIDTH) {
                let shade = &shades[usize::from(pixels >> (2 * i) & 3)];
                place
                    .iter_mut()
                    .zip(shade)
                    .for_each(|(place, byte)| *place = *byte);
            }
            let (y, x) = (row * LINES + line, column * WIDTH);
            let at = (y * frame.stride + x) * frame.bytes_per_pixel;
            if let Some(bytes) = bytes.get(..WIDTH * frame.bytes_per_pixel) {
                self.map.write(frame.start.wrapping_add(at as u64), bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(width: usize, height: usize) -> Framebuffer {
        Framebuffer {
            start: HostPhysAddr::new(0),
            bytes: (width * height * 4) as u64,
            width,
            height,
            stride: width,
            bytes_per_pixel: 4,
            red_first: false,
        }
    }

    #[test]
    fn cells_land_in_their_place_and_colours_and_nowhere_else() {
        let mut memory = vec![0u8; 64 * 48 * 4];
        // SAFETY: the "physical" range is the vector, which outlives the screen.
        let map = unsafe { DirectMap::new(memory.as_mut_ptr() as u64, memory.len() as u64) };
        // SAFETY: as above.
        let mut screen = unsafe { Screen::pixels(map, frame(64, 48)) }.unwrap();
        let (columns, rows) = screen.size();
        assert_eq!((columns, rows), (64 / WIDTH, 48 / LINES));
        // A red letter on blue, and one beyond each end.
        screen.draw(1, columns - 1, &[[b'M', 0x14]; 2]);
        screen.draw(rows, 0, &[[b'M', 0x14]]);
        let place = |index: usize| (index / 64, index % 64);
        for (index, pixel) in memory.chunks(4).enumerate() {
            let (y, x) = place(index);
            let inside = y / LINES == 1 && x / WIDTH == columns - 1;
            assert_eq!(inside, pixel != [0; 4], "{y} {x}");
            assert!(pixel[1] == 0 && pixel[3] == 0, "neither green nor more");
        }
        let has = |wanted: [u8; 4]| memory.chunks(4).any(|pixel| pixel == wanted);
        assert!(has([0xaa, 0, 0, 0]) && memory.chunks(4).any(|pixel| pixel[2] > 100));
        // Blank again, in what VGA calls black.
        screen.draw(1, 0, &[[b' ', 0x07]; 64]);
        assert!(memory.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn colours_follow_the_order_of_the_bytes() {
        let first = |bytes_per_pixel, red_first, attribute| {
            let frame = Framebuffer {
                bytes_per_pixel,
                red_first,
                ..frame(64, 48)
            };
            shades(&frame, attribute)[3]
        };
        assert_eq!(first(4, true, 0x0c), [0xff, 0x55, 0x55, 0]);
        assert_eq!(first(4, false, 0x0c), [0x55, 0x55, 0xff, 0]);
        assert_eq!(first(3, false, 0x01), [0xaa, 0, 0, 0]);
        assert_eq!(first(1, false, 0x07), [0xaa; 4]);
        assert_eq!(first(4, true, 0x0f), [0xff, 0xff, 0xff, 0]);
    }

    #[test]
    fn a_contradictory_description_is_refused() {
        let mut memory = vec![0u8; 64 * 48 * 4];
        // SAFETY: as above.
        let map = unsafe { DirectMap::new(memory.as_mut_ptr() as u64, memory.len() as u64) };
        let good = frame(64, 48);
        for bad in [
            Framebuffer {
                bytes_per_pixel: 0,
                ..good
            },
            Framebuffer {
                bytes_per_pixel: 9,
                ..good
            },
            Framebuffer {
                stride: usize::MAX,
                ..good
            },
            Framebuffer { width: 65, ..good },
            Framebuffer {
                height: 4800,
                ..good
            },
            Framebuffer {
                bytes: u64::MAX,
                ..good
            },
        ] {
            // SAFETY: nothing is written.
            assert!(unsafe { Screen::pixels(map, bad) }.is_none());
        }
    }
}
