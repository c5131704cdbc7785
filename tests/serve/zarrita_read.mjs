// Read an array over HTTP with zarrita and write its elements to standard output.
// node zarrita_read.mjs FOLDER-OF-ZARRITA URL PATH [ROW-START ROW-STOP]
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
const [folder, url, path, ...rows] = process.argv.slice(2);
const main = JSON.parse(readFileSync(`${folder}/package.json`, "utf8")).exports["."].import;
const zarr = await import(pathToFileURL(`${folder}/${main}`));
const array = await zarr.open(zarr.root(new zarr.FetchStore(url)).resolve(path), { kind: "array" });
const window = rows.length ? [zarr.slice(Number(rows[0]), Number(rows[1])), ...array.shape.slice(1).map(() => null)] : null;
const { data, shape } = await zarr.get(array, window);
process.stderr.write(JSON.stringify({ shape, dtype: array.dtype }));
process.stdout.write(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
