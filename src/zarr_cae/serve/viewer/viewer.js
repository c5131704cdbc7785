"use strict";
// The page of `zarr-cae serve`: OpenSeadragon over the tiles of /pictures.json.

const TILE = 256;
const MIN_PIXEL_RATIO = 0.5; // OpenSeadragon takes the finest level whose pixels are at least half a screen pixel wide
const element = (id) => document.getElementById(id);
const viewer = OpenSeadragon({
  element: element("viewer"),
  drawer: "canvas",
  showNavigationControl: false,
  minPixelRatio: MIN_PIXEL_RATIO,
  maxZoomPixelRatio: 8,
  imageSmoothingEnabled: false,
  gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
});
let pictures = [];
let smoothing = false;

const picture = () => pictures[Number(element("picture").value)];
const kind = () => document.querySelector("input[name=kind]:checked").value;
const scales = () => (kind() === "latents" ? picture().latents.scales : picture().level_of_scale.length);
const positions = () => [...element("axes").querySelectorAll("input[type=number]")].map((input) => input.value);

// OpenSeadragon counts levels from the coarsest one; scale 0 is the finest.
function source() {
  const { width, height } = kind() === "latents" ? picture().latents : picture();
  const most = scales() - 1;
  const base = `tiles/${element("picture").value}/${kind()}`;
  const at = positions().join(",");
  return {
    width, height, tileSize: TILE, tileOverlap: 0, minLevel: 0, maxLevel: most,
    getTileUrl: (level, column, row) => `${base}/${most - level}/${column}/${row}.png` + (at ? `?at=${at}` : ""),
  };
}

// Show another picture, kind or position, at the same place.
function show(keepPlace) {
  const bounds = keepPlace && viewer.world.getItemCount() ? viewer.viewport.getBounds() : null;
  smoothing = false;
  viewer.addOnceHandler("open", () => {
    if (bounds) viewer.viewport.fitBounds(bounds, true);
    describe();
  });
  viewer.open(source());
}

// An input for each axis of which one position is shown at a time.
function makeInputs() {
  const axes = kind() === "latents" ? picture().latents.axes : picture().axes;
  element("axes").replaceChildren(...axes.map(({ name, length }) => {
    const label = document.createElement("label");
    const slider = Object.assign(document.createElement("input"), { type: "range", min: 0, max: length - 1, value: 0 });
    const number = Object.assign(document.createElement("input"), { type: "number", min: 0, max: length - 1, value: 0 });
    slider.oninput = () => { number.value = slider.value; };
    slider.onchange = () => show(true);
    number.onchange = () => {
      number.value = Math.min(Math.max(0, Math.trunc(Number(number.value) || 0)), length - 1);
      slider.value = number.value;
      show(true);
    };
    label.append(`${name} `, slider, number);
    return label;
  }));
}

// Say which level the tiles on the screen are made of.
function describe() {
  const item = viewer.world.getItemAt(0);
  if (!item) return;
  const perPixel = 1 / item.viewportToImageZoom(viewer.viewport.getZoom(true));
  const smooth = kind() === "pixels" && perPixel > 1; // enlarged pixels stay visible as squares
  if (smooth !== smoothing) {
    smoothing = smooth;
    viewer.drawer.setImageSmoothingEnabled(smooth);
  }
  const scale = Math.min(Math.max(0, Math.ceil(Math.log2(perPixel * MIN_PIXEL_RATIO) - 0.01)), scales() - 1);
  const zoom = `${(100 / perPixel).toPrecision(3)} %`;
  if (kind() === "latents") {
    element("shown").value = `latents, ${zoom}`;
  } else {
    const level = picture().levels[picture().level_of_scale[scale]];
    element("shown").value = `${level.path || picture().name}: ${level.width} x ${level.height}, ${zoom}`;
  }
}

function choosePicture() {
  const latents = document.querySelector("input[value=latents]");
  latents.disabled = !picture().latents;
  if (latents.disabled) document.querySelector("input[value=pixels]").checked = true;
  makeInputs();
  show(false);
}

async function start() {
  const answer = await fetch("pictures.json");
  if (!answer.ok) throw new Error(`pictures.json: ${answer.status}`);
  pictures = await answer.json();
  element("picture").replaceChildren(...pictures.map(({ name }, index) => new Option(name, index)));
  element("picture").onchange = choosePicture;
  element("kinds").onchange = () => { makeInputs(); show(true); };
  element("closer").onclick = () => viewer.viewport.zoomBy(2).applyConstraints();
  element("farther").onclick = () => viewer.viewport.zoomBy(0.5).applyConstraints();
  element("home").onclick = () => viewer.viewport.goHome();
  viewer.addHandler("update-viewport", describe);
  choosePicture();
}

start().catch((error) => {
  element("shown").value = String(error);
  throw error;
});
