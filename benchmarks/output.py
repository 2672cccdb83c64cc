"Results as a table, CSV, JSON and plots"
import csv, json
from itertools import groupby
import matplotlib
matplotlib.use('agg')
from matplotlib import pyplot as plt, ticker
from .adapters import CONTESTANTS

# Okabe and Ito's colours, told apart by the colour-blind
PALETTE = ['#999999', '#0072B2', '#56B4E9', '#009E73', '#D55E00', '#E69F00', '#CC79A7', '#F0E442']
COLORS = dict(zip((c.name for c in CONTESTANTS), PALETTE))
FIELDS = 'part case contestant unit median min max ratio ratio_min ratio_max reference count why'.split()

def number(v):
    "Three digits"
    return f'{v:.3g}' if abs(v) < 1000 else f'{v:,.0f}'

def span(row, key):
    "Median (min–max), in ms below a second"
    small = row['unit'] in ('s', 's/epoch') and row['median'] < 1
    scale, unit = (1000, row['unit'].replace('s', 'ms', 1)) if small else (1, row['unit'])
    if key == 'ratio': scale, unit = 1, '×'
    mid, lo, hi = (number(row[k] * scale)
                   for k in (('ratio', 'ratio_min', 'ratio_max') if key == 'ratio' else ('median', 'min', 'max')))
    return f'{mid} {unit}' + (f' ({lo}–{hi})' if len(row['rounds']) > 1 else '')

def line(row):
    "One contestant"
    if row['why']: return f'  {row["contestant"]:28}not run: {row["why"]}'
    ratio = span(row, 'ratio') if 'ratio' in row else ''
    return f'  {row["contestant"]:28}{span(row, "median"):32}{ratio:28}{row["count"]}'.rstrip()

def table(rows):
    "Text, case by case"
    out = []
    for (part, case), group in groupby(rows, key=lambda r: (r['part'], r['case'])):
        group = list(group)
        base = next((f'   (ratio to {r["reference"]})' for r in group if 'reference' in r), '')
        out += [f'{part}: {case}{base}', *map(line, group), '']
    return '\n'.join(out)

def panel(ax, case, group):
    "Horizontal bars of one case, with what each says at its end"
    key = 'ratio' if any('ratio' in r for r in group) else 'median'
    for i, r in enumerate(group):
        if key not in r or r[key] <= 0:
            ax.text(.01, i, 'not run' if r['why'] else number(r.get(key, 0)), transform=ax.get_yaxis_transform(),
                    va='center', fontsize=8)
            continue
        lo, hi = (r[k] for k in (('ratio_min', 'ratio_max') if key == 'ratio' else ('min', 'max')))
        ax.barh(i, r[key], color=COLORS.get(r['contestant'], '#000000'), xerr=[[r[key] - lo], [hi - r[key]]],
                error_kw=dict(lw=1))
        ax.text(hi, i, f' {number(r[key])}', va='center', fontsize=8)
    ax.set(xscale='log', yticks=range(len(group)), title=case,
           xlabel=f'times {group[0]["reference"]}' if key == 'ratio' else group[0]['unit'])
    ax.set_yticklabels([r['contestant'] for r in group])
    ax.title.set_fontsize(9)
    ax.xaxis.set_major_formatter(ticker.LogFormatter())
    ax.xaxis.set_minor_formatter(ticker.LogFormatter(labelOnlyBase=False))
    ax.margins(x=.15)
    ax.invert_yaxis()

def plot(rows, folder):
    "One picture for each measure"
    for part, group in groupby(rows, key=lambda r: r['part']):
        cases = [(c, list(g)) for c, g in groupby(group, key=lambda r: r['case'])]
        fig, axs = plt.subplots(len(cases), 1, figsize=(8, .9 + 2.1*len(cases)), squeeze=False, layout='constrained')
        for ax, case in zip(axs[:, 0], cases): panel(ax, *case)
        fig.savefig(folder/f'{part.replace(" ", "_").replace("%", "")}.png', dpi=110)
        plt.close(fig)

def save(rows, machine, text, folder):
    "Everything, into `folder`"
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'results.txt').write_text(text, encoding='utf-8')
    (folder/'results.json').write_text(json.dumps(dict(machine=machine, rows=rows), indent=1), encoding='utf-8')
    with open(folder/'results.csv', 'w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, FIELDS, extrasaction='ignore')
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, folder)
