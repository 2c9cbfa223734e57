// What a mark says appears beside the pointer, and on touch; without this script the browser's own tooltip does it.
const hover = document.getElementById('hover');
document.addEventListener('pointerover', event => {
  const mark = event.target.closest('svg *');
  const holder = mark && (mark.querySelector(':scope > title') ? mark : mark.closest('g'));
  const title = holder && holder.querySelector(':scope > title');
  hover.hidden = !title;
  if (!title) return;
  hover.textContent = title.textContent;
  const place = holder.getBoundingClientRect(), own = hover.getBoundingClientRect();
  const left = Math.min(Math.max(8, (holder.matches('polyline') ? event.clientX : place.left + place.width / 2) - own.width / 2),
    document.documentElement.clientWidth - own.width - 8);
  const at = holder.matches('polyline') ? event.clientY : place.top;
  hover.style.left = `${left}px`;
  hover.style.top = `${at - own.height - 8 < 4 ? at + 20 : at - own.height - 8}px`;
});
document.addEventListener('scroll', () => { hover.hidden = true; }, { passive: true });
